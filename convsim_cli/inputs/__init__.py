"""Images to train and measure with: data sets and folders."""
