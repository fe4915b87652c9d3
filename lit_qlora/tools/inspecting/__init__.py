"""What `inspect` is made of: a look at the batches of a fit, doubles, the verdict, and how they are shown."""
