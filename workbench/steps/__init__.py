"""The sentences of the loop, one file each; they speak to the world through `workbench.ports` only."""
