"""No dropout inside the block, Paddle's own outside; the configuration is as it was."""

import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F

from finetune.machine.randomness.no_dropout import NoDropout

P = 0.5


class Config:
    def __init__(self):
        self.hidden_dropout_prob, self.attention_dropout, self.hidden_size = P, 0.0, 4

    def to_dict(self):
        return dict(vars(self))


class Model(nn.Layer):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.drop, self.dense = nn.Dropout(P), nn.Linear(4, 4)

    def forward(self, x):
        return F.dropout(self.dense(self.drop(x)), self.config.hidden_dropout_prob, training=self.training)


@pytest.fixture
def model():
    return Model()


def test_nothing_is_dropped_inside(model):
    x = paddle.ones([64, 4])
    model.eval()
    expected = model(x).numpy()
    model.train()
    with NoDropout(model).active(1, [[(64, 0)]]):
        assert (model(x).numpy() == expected).all()
        assert model.config.hidden_dropout_prob == 0.0, "kernels that drop by themselves read it"
    assert model.config.hidden_dropout_prob == P
    assert (model(x).numpy() != expected).any()


def test_an_error_inside_leaves_all_as_it_was(model):
    original = F.dropout
    with pytest.raises(ZeroDivisionError), NoDropout(model).active(1, []):
        raise ZeroDivisionError
    assert F.dropout is original and model.config.hidden_dropout_prob == P
