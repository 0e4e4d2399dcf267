"""What a backward pass can tell about a layer, measured only when it is due."""
