"""Back ends: each turns a program into a kernel. ``reference`` defines what a program means."""
