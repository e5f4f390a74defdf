"""One module per recipe; its docstring gives the command, data, time and measured result."""
