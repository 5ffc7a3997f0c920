"""Sets of tasks and inputs as the tests read them."""

import numpy as np


def pairs(rows):
    return [tuple(row) for row in rows.tolist()]


def assert_task_split(split, modulus, num_train):
    """Tasks of Z_p^2, none twice, none both seen and unseen."""
    train, unseen = pairs(split.train_W2), pairs(split.unseen_U2)
    assert len(train) == num_train
    assert len(set(train + unseen)) == len(train + unseen)
    assert all(0 <= v < modulus for task in train + unseen for v in task)
    assert split.train_W2.dtype == split.unseen_U2.dtype == np.int32
    assert split.train_W2.shape[1:] == split.unseen_U2.shape[1:] == (2,)
