"""Gains of trained MTP layers that were published elsewhere, and the variants set beside them.

They are of another model, DeepSeek's 671B, on other text: what is set beside them here is of the
same kind (weights and number of drafts) but tells nothing about theirs.
"""

import dataclasses

from train_mtp.study.compare import OBJECTIVE, Study

SOURCE = (
    "[Tencent Taiji Angel-HCF, 11 July 2025](https://mp.weixin.qq.com/s/w_sb_ei-tSGVz9asI9cidQ)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published gain over the open-source layer, recycled for every draft.

    Attributes:
        name: theirs.
        weights: "shared" or "independent".
        drafts: tokens a step.
        layers: trained.
        gain: of output tokens per second and request, as a part.
    """

    name: str
    weights: str
    drafts: int
    layers: int
    gain: float

    def variants(self, study: Study) -> list[str]:
        """Those with the same weights that were trained for as many drafts, on the baseline's
        objective; those on its data first, and of them those with as many layers as theirs.
        """
        usual = study.of(study.baseline)
        found = [
            name
            for name in study.names
            if (row := study.of(name))["trained"]
            and row["weights"] == self.weights
            and row["layers"] >= self.drafts
            and all(row[field] == usual[field] for field in OBJECTIVE)
        ]

        def distance(name: str) -> tuple[bool, bool]:
            row = study.of(name)
            return row["data"] != usual["data"], row["layers"] != self.layers

        return sorted(found, key=distance)


PUBLISHED = (
    Published(name="shared MTP2", weights="shared", drafts=2, layers=5, gain=0.074),
    Published(name="independent MTP2", weights="independent", drafts=2, layers=5, gain=0.088),
    Published(name="independent MTP3", weights="independent", drafts=3, layers=5, gain=0.090),
)
