"""How good labels and models are: metrics, effort."""
