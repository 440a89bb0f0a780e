"""What server and clients say to each other, and how it travels in Flower's messages."""
