"""Networks: ResNet20 for small images, and the paper's four."""
