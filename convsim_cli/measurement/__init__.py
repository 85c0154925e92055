"""What is measured per layer: the figures, the feature maps, synthetic inputs and heat maps."""
