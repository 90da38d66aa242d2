"""What optimising against a reward model gains and loses: best of n."""
