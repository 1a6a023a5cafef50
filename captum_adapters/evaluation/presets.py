"""Methods, protocols and printed figures of the three papers.

A preset is what a paper's table compares, to be run on the data and the network at
hand. Printed figures are of other data or networks: it is the order of methods that can
be compared with them, hardly the numbers.
"""

from typing import Any, NamedTuple

RATIO, SYMMETRIC = "resnet_lrp_ratio", "resnet_lrp_symmetric"
# The ratio paper's text: no rule of ours for lattices
TEXT = "projection=literal,coverage=literal"
# Its published code: https://github.com/keio-smilab24/LRP-for-ResNet
CODE = f"{TEXT},first_layer=ones,maxpool=avg2x2,dead_units=drop"
NO_IDENTITY = "identity_skip=False"


class Preset(NamedTuple):
    """A table or figure of a paper."""

    title: str
    about: str  # how it is run here, and what differs from the paper
    rows: dict[str, str]  # names of the paper's methods by ours
    metrics: tuple[str, ...]
    options: dict[str, Any]  # other fields of an evaluation
    printed: dict[str, dict[str, float]]  # the paper's figures by method and column
    columns: tuple[str, ...]  # what to compare with the paper's


AREAS = ("insertion_keio", "deletion_keio", "id_keio")
OTHER = "not in the paper"


def _areas(title: str, about: str, rows: dict[str, tuple[Any, ...]]) -> Preset:
    """A table of insertion, deletion and their difference, after the names of methods."""
    about = (
        "The published code explains the predicted class, and measures the probability of"
        " the label, from black images; our protocol measures that of the explained"
        f" class. {about}"
    )
    names = {method: row[0] for method, row in rows.items()}
    printed = {method: dict(zip(AREAS, row[1:])) for method, row in rows.items() if row[1:]}
    options = {"published": "label", "initial": "softmax"}
    metrics = ("insertion_deletion", "conservation")
    return Preset(title, about, names, metrics, options, printed, AREAS)


def _pixels(title: str, about: str, rows: dict[str, str], *columns: str) -> Preset:
    """A figure of the most relevant pixels, for which the paper prints only curves."""
    title = f"R-LRP (Nyiri & Gibaru), {title}"
    ranked = "Pixels are ranked by the magnitude of the sum over channels, as in the paper."
    metrics = tuple(name.removesuffix("_accuracy") for name in columns)
    options = {"rank_by": "magnitude", "initial": "one"}
    return Preset(title, f"{ranked} {about}", rows, metrics, options, {}, columns)


CLASSIC = {
    "relative_lrp": "R-LRP",
    "lrp_alpha_beta_2_-1": "LRP-αβ (2, −1)",
    "lrp_alpha_beta_0.5_0.5": "LRP-αβ (0.5, 0.5)",
    "lrp_gamma_0.25": "LRP-γ (0.25)",
    "lrp_epsilon_1": "LRP-ε (1)",
    "lrp_0": "LRP-0",
    "relative_lrp:cardinality=per_position": "R-LRP, Card(J) counted",
    RATIO: OTHER,
}
CLASSES = "The paper shows its best and its worst class of twelve"
CUB = "The printed figures are of CUB-200-2011."

#: All presets by name.
PRESETS: dict[str, Preset] = {
    "lrp-for-resnet-table1": _areas(
        "LRP for ResNet (Otsuki et al. 2024), Table 1, ImageNet",
        "LRP [Bach 15] is Captum's, which finds no additions in torchvision's networks;"
        " Zennit's EpsilonPlus with its canonizer is added. The method is run as in the"
        " text (but for the first layer and dead units), as in the published code (but"
        " for its stabilizer), and with our defaults.",
        {
            "captum_lrp": ("LRP", 0.095, 0.083, 0.011),
            "epsilon_plus+zennit": (OTHER,),
            "integrated_gradients": ("IG", 0.052, 0.062, -0.011),
            "guided_backprop": ("Guided BP", 0.115, 0.057, 0.057),
            "grad_cam": ("Grad-CAM", 0.497, 0.126, 0.371),
            "score_cam": ("Score-CAM", 0.488, 0.133, 0.355),
            f"{RATIO}:{TEXT}+quantize8": ("Ours (text)", 0.563, 0.018, 0.545),
            f"{RATIO}:{CODE}+quantize8": ("Ours (published code)", 0.563, 0.018, 0.545),
            RATIO: (OTHER,),
            f"{RATIO}+quantize8": (OTHER,),
        },
    ),
    "lrp-for-resnet-table2": _areas(
        "LRP for ResNet (Otsuki et al. 2024), Table 2, ablation",
        "Rows (i) and (iii) have the same figures in the paper. All with eight levels;"
        " our own variants are added with and without these.",
        {
            f"{SYMMETRIC}:{NO_IDENTITY},{TEXT}+quantize8": ("(i)", 0.543, 0.033, 0.510),
            f"{SYMMETRIC}:{TEXT}+quantize8": ("(ii)", 0.553, 0.036, 0.517),
            f"{RATIO}:{NO_IDENTITY},{TEXT}+quantize8": ("(iii)", 0.543, 0.033, 0.510),
            f"{RATIO}:{TEXT}+quantize8": ("(iv)", 0.563, 0.018, 0.545),
            f"{RATIO}:{TEXT}": ("(iv) without quantization",),
            RATIO: ("projection=spread, coverage=even",),
            f"{RATIO}+quantize8": ("the same, quantized",),
            f"{RATIO}:projection=spread,coverage=literal": ("projection=spread",),
            f"{RATIO}:batch_norm=merge": ("batch_norm=merge",),
            f"{RATIO}:first_layer=ones": ("first_layer=ones",),
            f"{RATIO}:first_layer=zbox": ("first_layer=zbox",),
            SYMMETRIC: ("symmetric",),
        },
    ),
    "c3-lrp-table1": _areas(
        "C³-LRP (Doublet et al.), Table 1",
        f"The paper gives no protocol beyond the equations; its group's code is taken. {CUB}"
        " For ABN, add abn:weights=FILE to the methods after training by"
        " examples/abn/train.py.",
        {
            "rise": ("RISE", 0.371, 0.043, 0.328),
            "grad_cam": ("GradCAM", 0.466, 0.156, 0.310),
            "captum_lrp": ("LRP", 0.063, 0.051, 0.011),
            "abn": ("ABN", 0.282, 0.075, 0.207),
            "block_lrp+c3": ("Ours", 0.685, 0.017, 0.668),
            "block_lrp:initial=logit+c3": ("Ours, from the logit",),
            f"{RATIO}+c3": (OTHER,),
            "input_x_gradient": (OTHER,),
        },
    ),
    "c3-lrp-table2": _areas(
        "C³-LRP (Doublet et al.), Table 2, ablation",
        f"{CUB} The same choices are applied to our maps, to a centred Gaussian and to"
        " edges, which tells how much of the gain is due to the map.",
        {
            "block_lrp": ("(i) None", 0.250, 0.018, 0.232),
            "block_lrp+c1c": ("(ii) C1C", 0.642, 0.042, 0.600),
            "block_lrp+c3": ("(iii) C³", 0.685, 0.017, 0.668),
            "block_lrp:initial=logit": ("(i), from the logit",),
            "block_lrp:initial=logit+c3": ("(iii), from the logit",),
            RATIO: (OTHER,),
            f"{RATIO}+c1c": (OTHER,),
            f"{RATIO}+c3": (OTHER,),
            "gaussian+c3": ("control",),
            "sobel+c3": ("control",),
        },
    ),
    "r-lrp-fig19": _pixels(
        "Figure 19: VGG-16 and VGG-19",
        "The paper has VGG networks: choose --model vgg16 or vgg19. It prints curves, and"
        " no figures.",
        CLASSIC, "accuracy",
    ),
    "r-lrp-fig21": _pixels(
        "Figure 21: ResNet-50",
        "The paper prints curves, and no figures; LRP-ε and LRP-γ are left out there, as"
        " they overflow or are bad.",
        CLASSIC, "accuracy",
    ),
    "r-lrp-fig22": _pixels(
        "Figure 22: across networks",
        "Other networks are named by --cross NAME=WEIGHTS, and run once for each network"
        " whose pixels are given to others.",
        {"relative_lrp": "R-LRP", RATIO: OTHER}, "accuracy", "cross_accuracy",
    ),
    "r-lrp-fig25": _pixels(
        "Figure 25: pointing game, ResNet-50",
        f"{CLASSES}. Masks are needed; without labels that the network has, add --labels"
        " ignore.",
        CLASSIC, "pointing",
    ),
    "r-lrp-fig28": _pixels(
        "Figure 28: distance to the mask, ResNet-50",
        f"{CLASSES}, with distances normalized in a way that it does not state: here by"
        " the diagonal. Masks are needed.",
        CLASSIC, "distance",
    ),
}
