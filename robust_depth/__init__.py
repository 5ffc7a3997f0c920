"""Deep linear models that are robust to gross corruption. Not written yet: nothing is here to call.

Source: Ma & Fattahi, "Blessing of Depth in Linear Regression" (NeurIPS 2022, arXiv 2207.07612).
"""
