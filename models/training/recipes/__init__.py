"""One file per recipe; its docstring gives the command, the data, the time and the measured result."""
