"""Training loops that one does not own: a command (command.py), run as a process (process.py).

Used by scripts alone.  Nothing in here needs torch.
"""
