"""Names of metrics, and their scores in tables: all that the command line and reports need
of them, so that they start without PyTorch."""

from typing import NamedTuple, Optional

# Those of `captum_adapters.evaluation.metrics`. Conservation needs relevance before any
# post-processing, which is measured apart
METRICS = (
    "insertion_deletion", "rise", "c3", "accuracy", "cross", "pointing", "distance",
    "attention", "contrastive", "grid_pointing", "class_sensitivity", "randomization",
    "conservation",
)
DEFAULT = ("insertion_deletion", "conservation")
# those that rank pixels, where tied ones are divided
TOP = ("accuracy", "cross", "pointing", "distance")
# not defined without a mask
MASKED = ("pointing", "distance", "attention")
# Pixels between two points of RISE's published code
RISE_STEP = 224


INSERTION = "Insertion and deletion"
PROTOCOLS = {
    "default": "our protocol",
    "keio": "published code of Otsuki et al. 2024",
    "rise": "published code of RISE",
    "c3": "text of C³-LRP",
}


class Column(NamedTuple):
    """A score in a table."""

    title: str
    better: Optional[str]  # "higher", "lower", or None if neither is better
    about: str  # one sentence
    topic: str = INSERTION  # title of its table
    protocol: str = "default"  # ours, or the published one

    @property
    def by(self) -> str:
        """What its protocol is called."""
        return PROTOCOLS[self.protocol]

    @property
    def table(self) -> str:
        """Title of its table: that of insertion and deletion is divided by protocol."""
        return f"{self.topic}, {self.by}" if self.topic == INSERTION else self.topic

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is, 0 if neither."""
        return (self.better == "higher") - (self.better == "lower")

    @property
    def heading(self) -> str:
        """The title, with an arrow to where it is better."""
        return self.title + ("", " ↑", " ↓")[self.sign]


def _areas(protocol: str, about: str) -> dict[str, Column]:
    """The three columns of insertion and deletion."""
    suffix = "" if protocol == "default" else f"_{protocol}"
    texts = {
        "insertion": ("Insertion", "higher", "Area under the insertion curve"),
        "deletion": ("Deletion", "lower", "Area under the deletion curve"),
        "id": ("ID", "higher", "Insertion minus deletion"),
    }
    return {
        f"{name}{suffix}": Column(title, better, f"{text}, {about}.", protocol=protocol)
        for name, (title, better, text) in texts.items()
    }


def _topic(topic: str, *columns: tuple[str, str, Optional[str], str]) -> dict[str, Column]:
    """Columns of a table: names, titles, what is better, and what they are."""
    return {
        name: Column(title, better, about, topic) for name, title, better, about in columns
    }


MEAN = "mean over p, and over orders of equal pixels."
#: All scores by the names that they have in records.
COLUMNS: dict[str, Column] = {
    **_areas("default", "each pixel counted, with both ends, equal pixels together"),
    **_areas("keio", "by the published code of Otsuki et al. 2024"),
    **_areas("rise", "by the published code of RISE"),
    **_areas("c3", "by the text of C³-LRP"),
    **_topic(
        "Top pixels",
        ("accuracy", "Accuracy", "higher", "Share of images whose class is found with"
         f" only the top p % of pixels, {MEAN}"),
        ("cross_accuracy", "Cross accuracy", "higher", "The same for another network that"
         " is given the pixels, mean over p."),
        ("pointing", "Pointing", "higher", "Share of the top p % of pixels that is inside"
         f" of the mask, {MEAN}"),
        ("pointing_chance", "Mask share", None, "Share of the mask: pointing by chance."),
        ("distance", "Distance", "lower", "Mean distance of the top p % of pixels to the"
         f" mask, in image diagonals, {MEAN}"),
        ("distance_chance", "Mean distance", None, "Mean distance of all pixels to the"
         " mask."),
    ),
    **_topic(
        "Class evidence",
        ("contrastive_id", "Contrastive ID", "higher", "Insertion minus deletion of the"
         " probability of the class minus that of the runner-up. By chance it is 0."),
        ("grid_pointing", "Grid pointing", "higher", "Share of positive relevance in the"
         " own cell of a mosaic of four classes, at most 1, for images that are classified"
         " correctly with a probability of at least 0.9."),
        ("grid_pointing_chance", "Cell share", None, "Share of the cell: grid pointing by"
         " chance."),
        ("class_pearson", "Class correlation", None, "Correlation with the map of the"
         " runner-up: 1 if the class does not matter, about 0 for unrelated maps, and -1"
         " for a contrast that asks for one class and not the other."),
        ("class_ssim", "Class SSIM", "lower", "Structural similarity with the map of the"
         " runner-up: 1 if the class does not matter, low by construction for contrasts."),
        ("random_ssim", "Random SSIM", "lower", "Structural similarity with the map of the"
         " network with a random last layer, 1 if that does not matter."),
    ),
    **_topic(
        "Attention",
        ("attention_coverage", "Covered", None, "Share of the object that is attended:"
         " where the map is above its mean."),
        ("attention_precision", "Focused", None, "Share of what is attended that is on"
         " the object."),
        ("attention_correct", "Correct", "higher", "Share of images where half of the"
         " object is attended, and half of what is attended is on the object."),
        ("attention_insufficient", "Insufficient", None, "Share of images where only the"
         " first is not so: too little is attended."),
        ("attention_over", "Over", None, "Share of images where only the second is not"
         " so: too much is attended."),
        ("attention_wrong", "Wrong", None, "Share of images where neither is so."),
    ),
    **_topic(
        "Conservation",
        ("gap", "Gap", None, "Relevance gained or lost on the way, relative to the initial:"
         " mean of magnitudes."),
        ("gap_largest", "Largest gap", None, "The same of the image where it is largest."),
        ("relevance_sum", "Sum", None, "Sum of relevance."),
        ("initial", "Initial", None, "Relevance at the output."),
    ),
    **_topic(
        "Ties",
        ("tied_share", "Ties", None, "Share of pixels with the same value as another."),
        ("tied_share_magnitude", "Ties in magnitude", None, "The same for magnitudes, if"
         " accuracy, pointing and distance rank by these."),
        ("distinct_levels", "Levels", None, "Number of distinct values of a map."),
        ("negative", "Negative maps", None, "Share of maps without any positive value."),
    ),
    **_topic(
        INSERTION,
        ("score_full", "Whole", None, "Probability for the whole image."),
        ("score_blank", "Blank", None, "Probability for a blank image."),
    ),
}


def column_of(name: str) -> Column:
    """What is known about a score, also if it is of another version."""
    return COLUMNS.get(name, Column(name, None, ""))


def counterpart_of(name: str) -> Optional[str]:
    """The score by our protocol for one by a published protocol."""
    ours = name.removesuffix(f"_{column_of(name).protocol}")
    return ours if ours != name else None
