"""What the families of one kind share."""
