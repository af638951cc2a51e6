"""What the examples train with: scripts alone import from here.  No other room knows of MNIST."""
