"""Training loops that one does not own.  Used by scripts alone.

command.py       any program: a command line (process.py runs it, metric.py finds its metric)
huggingface.py   the Trainer of transformers
"""
