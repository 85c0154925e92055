"""Images to train and measure with: datasets and folders."""
