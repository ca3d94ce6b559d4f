"""The machine and its libraries: devices, CPU settings, versions, what is replaced in Paddle, what is kept quiet."""
