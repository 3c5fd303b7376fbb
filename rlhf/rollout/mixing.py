"""The weight of the pretraining text in PPO's steps, relative to the policy's gradient."""

import math

KEPT = 0.9  # Share of the running means that a step keeps.


class GradientRatio:
    """The weight with which the text's gradient has `ratio` times the norm of the policy's.

    Both norms are running means over the steps, `mean = 0.9 mean + 0.1 norm`, since those of single steps scatter; they
    begin with the first step's. Before it the weight is `ratio` itself.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._means: tuple[float, float] | None = None

    @property
    def weight(self) -> float:
        """The weight of the next step."""
        if self._means is None:
            return self.ratio
        return self.ratio * self._means[0] / self._means[1]

    def update(self, policy: float, text: float) -> None:
        """Take in the norms of a step's two gradients, each without its weight.

        A norm that is not finite or 0 (answers that are all alike have no gradient) is passed over.
        """
        if not (0.0 < policy < math.inf and 0.0 < text < math.inf):
            return
        old = self._means or (policy, text)
        self._means = (KEPT * old[0] + (1 - KEPT) * policy, KEPT * old[1] + (1 - KEPT) * text)
