"""What `doctor` is made of: what is found of this machine."""
