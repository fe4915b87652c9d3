"""What `push` is made of: the hub's side."""
