"""Movement of checkpoints between disk, host memory and devices."""
