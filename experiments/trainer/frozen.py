"""Parameters that are not trained: they get no gradient and no optimizer state."""

import dataclasses
from typing import Any

import jax
import optax

Tree = Any


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Which parameters are trained.

    Attributes:
      mask: True for those that are, the parameters' tree.

    >>> some = Trainable({"head": True, "body": False})
    >>> some.take({"head": 1.0, "body": 2.0})
    {'body': MaskedNode(), 'head': 1.0}
    >>> some.put({"head": 3.0, "body": optax.MaskedNode()}, {"head": 1.0, "body": 2.0})
    {'body': 2.0, 'head': 3.0}
    """

    mask: Tree

    def take(self, tree: Tree) -> Tree:
        """The tree with a placeholder, which has no leaves, for what is frozen."""
        return jax.tree.map(lambda trained, x: x if trained else optax.MaskedNode(), self.mask, tree)

    def put(self, trained: Tree, parameters: Tree) -> Tree:
        """The parameters with what is trained taken from `trained`."""
        return jax.tree.map(lambda is_trained, new, old: new if is_trained else old, self.mask, trained, parameters)
