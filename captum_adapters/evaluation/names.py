"""Names of methods and layouts: all that the command line and reports need of them, so
that they start without PyTorch."""

OWN = ("resnet_lrp_ratio", "resnet_lrp_symmetric", "gamma_lrp", "relative_lrp", "block_lrp")
# methods of others that only the evaluator has
OTHERS = (
    "input_x_gradient", "gradient", "integrated_gradients", "guided_backprop",
    "captum_lrp", "grad_cam", "score_cam", "rise", "abn",
)
# maps that explain nothing
CONTROLS = ("random", "constant", "gaussian", "sobel")

LAYOUTS = ("folder", "csv", "imagenet", "cub")
LABELS = ("given", "order", "ignore")


def base_of(text: str) -> str:
    """Name of a method without options and suffixes."""
    return text.partition("+")[0].partition(":")[0]


def kind_of(text: str) -> str:
    """`"ours"`, `"baseline"` or `"control"`, also of a method that is not there now."""
    base, suffixes = base_of(text), text.split("+")[1:]
    if base in CONTROLS:
        return "control"
    # a composite of others is ours with our splitting
    split = base not in OTHERS and bool({"ratio", "symmetric"} & {*suffixes})
    return "ours" if split or base in OWN else "baseline"


def stands_for(text: str, name: str) -> bool:
    """Whether a method is meant by a name: methods of others have any options, no suffix."""
    return text == name or (name in OTHERS and "+" not in text and base_of(text) == name)
