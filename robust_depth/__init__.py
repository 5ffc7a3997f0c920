"""Deep models that are robust to gross corruption, and how flat their loss is around a solution.

Source: Ma & Fattahi, "Blessing of Depth in Linear Regression" (NeurIPS 2022, arXiv 2207.07612).
"""
