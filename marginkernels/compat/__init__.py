"""The names of other libraries' heads over the fused kernels: one module per library, imported by its user and by nothing here."""
