"""What `plan` is made of: the rows as far as they are known here, and the words."""
