"""The SVD of matrices that are never formed. Not written yet: nothing is here to call.

Source: Abu-El-Haija et al., "Implicit SVD for Graph Representation Learning" (NeurIPS 2021,
arXiv 2111.06312).
"""
