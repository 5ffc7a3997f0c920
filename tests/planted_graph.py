"""A graph with communities, whose nodes have words that lean to their class."""

import numpy as np
import scipy.sparse


def planted(seed=0, size=90, classes=3, words=40):
    """(adjacency (N, N), features (N, W), labels_N, training, validation and test nodes)"""
    rng = np.random.default_rng(seed)
    labels_N = np.arange(size) % classes
    a_NN = rng.random((size, size)) < np.where(labels_N[:, None] == labels_N, 0.2, 0.03)
    a_NN = np.triu(a_NN, 1)
    a_NN = (a_NN | a_NN.T).astype("f")
    leaning = np.arange(words) % classes == labels_N[:, None]
    x_NF = (rng.random((size, words)) < np.where(leaning, 0.3, 0.08)).astype("f")
    graph, features = scipy.sparse.csr_array(a_NN), scipy.sparse.csr_array(x_NF)
    return graph, features, labels_N, np.arange(15), np.arange(15, 45), np.arange(45, size)
