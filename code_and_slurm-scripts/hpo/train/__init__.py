"""What the examples train with: scripts alone import from here.  No other room knows of MNIST.

mnist, training, capture    optuna_mnist.py: images, epochs, a step as one CUDA graph
pairs, seq2seq              optuna_t5.py: pairs of texts, and a model from one to the other
texts, causal, base_model   optuna_llm.py: texts, their loss, the model in a folder
french                      numbers in words, for the last two
ddp                         one trial over several GPUs
"""
