"""Neural mixture models (arXiv 2107.02453): a network's outputs are the densities of clusters.

    python -m dec_diffusion.main --config=configs/neural_mixture.py[:variant] [--config.a.b=value]

| variant | data                                   | needs                                      |
| ------- | -------------------------------------- | ------------------------------------------ |
| digits  | scikit-learn's 1,797 digits, 8x8       | nothing                                    |
| blobs   | 1,000 points in four groups            | nothing; --config.data.blobs=gmm10, imb3   |
| mnist   | all 70,000 of MNIST                    | --config.data.path=DIR                     |
| fashion | all 70,000 of Fashion-MNIST            | --config.data.path=DIR                     |
| usps    | 9,298 images of 16x16                  | --config.data.path=usps.h5, h5py           |
| cifar10 | all 60,000 of CIFAR-10                 | --config.data.path=DIR, an accelerator     |
| stl10   | the 13,000 labelled of STL-10          | --config.data.path=DIR, an accelerator     |
| images  | a folder or an array of images         | --config.data.path=PATH                    |
| vectors | a table or an array of vectors         | --config.data.path=FILE                    |
| paper   | MNIST, literally what is known of the  | --config.data.path=DIR                     |
|         | paper: shared constant, soft E-step    |                                            |

Measured (mean and standard deviation of a sample over seeds, no selection, labels for scores only):

digits      ACC .948 +- .002, NMI .917 +- .003, ARI .894 +- .003; the command above with
            --seeds=0..4. The first run takes 31 s and 0.9 GiB on two idle cores
mnist       ACC .981 +- .001, NMI .950 +- .003, ARI .959 +- .003 over seeds 0 to 2; 2,457 steps,
            9 min a run on one core of two that other work shared
usps        ACC .984 +- .001, NMI .957 +- .002, ARI .968 +- .002 over seeds 0 to 2; 1,080 steps,
            9 min on one core of two
fashion     ACC .680 +- .062, NMI .676 +- .025, ARI .558 +- .054 over seeds 0 to 2 (k-means on
            pixels .501, .491, .340); 2,457 steps, 11 to 14 min a run on a core that more than
            one other job shared
the others  not measured
"""

from dec_diffusion.config import Config, Variants, of_variant
from dec_diffusion.methods.neural_mixture import NeuralMixture

# Four small networks; the head that knows most of one view from another predicts.
_DIGITS = {
    "network": "mlp",
    "networks": 4,
    "heads": 3,
    "width": 256,
    "hidden": 128,
    "iterations": 15,
    "steps": 100,
}

# Fifty further groups keep a class's odd shapes apart while the classes form; neighbours vouch for
# what no transformation of an image shows.
_MNIST = {
    "width": 16,
    "heads": 5,
    "over_heads": 1,
    "neighbours": 5,
    "iterations": 9,
    "steps": 273,  # one pass over 70,000; fewer images need hardly fewer steps
    "learning_rate": 3e-3,
}

# Moved, mirrored, cropped and recoloured photographs; a further set of many clusters makes the
# features richer.
_PHOTOS = {
    "network": "resnet18",
    "width": 64,
    "hidden": 512,
    "dtype": "bfloat16",
    "heads": 5,
    "over_heads": 2,
    "over_clusters": 70,
    "rotate": 0.0,
    "shift": 0.0,
    "scale": 0.0,
    "shear": 0.0,
    "crop": 0.8,
    "flip": True,
    "jitter": 0.4,
    "jitter_probability": 0.8,
    "grey": 0.2,
    "iterations": 200,
    "steps": 0,
    "learning_rate": 3e-4,
    "weight_decay": 1e-4,
}

_POINTS = {
    "width": 64,
    "hidden": 64,
    "networks": 5,
    "heads": 1,
    "density": "X",
    "tau": 0.7,
    "tau_start": 0.7,
    "noise": 0.2,
    "iterations": 10,
    "steps": 100,
    "learning_rate": 3e-3,
    "decay": False,
}

# Sigmoids of standardised scores over one constant, and plain EM fused with consistency. See
# docs/neural_mixture.md for why this does not cluster ten classes.
_PAPER = {
    "density": "S",
    "tau": 1.0,
    "tau_start": 1.0,
    "heads": 1,
    "width": 32,
    "iterations": 30,
    "steps": 0,
    "ema": 0.0,
}

VARIANTS: Variants = {
    "digits": (_DIGITS, {"name": "digits"}, {"batch_size": 256}),
    "blobs": (
        _POINTS | {"num_clusters": 4},
        {"name": "blobs", "blobs": "gmm4"},
        {"batch_size": 256, "evaluate_every": 1},
    ),
    "mnist": (_MNIST, {"name": "mnist"}, {"batch_size": 256}),
    "fashion": (
        _MNIST | {"rotate": 5.0, "shear": 0.0, "flip": True},
        {"name": "fashion-mnist"},
        {"batch_size": 256},
    ),
    "usps": (
        _MNIST
        | {"over_heads": 0, "neighbours": 0, "steps": 0}
        | {"density": "X", "tau": 0.5, "tau_start": 0.7, "networks": 4, "heads": 3}
        | {"prior": "learned", "prior_floor": 0.5, "prior_strength": 0.5}
        | {"rotate": 10.0, "shift": 0.08, "iterations": 30},
        {"name": "usps"},
        {"batch_size": 256},
    ),
    "cifar10": (_PHOTOS, {"name": "cifar10"}, {"batch_size": 512}),
    "stl10": (_PHOTOS | {"iterations": 500}, {"name": "stl10"}, {"batch_size": 512}),
    "images": (
        _MNIST | {"flip": True, "steps": 100},
        {"name": "array", "kind": "images"},
        {"batch_size": 256},
    ),
    "vectors": (
        _POINTS | {"num_clusters": 10, "width": 256, "hidden": 128, "iterations": 20},
        {"name": "array", "kind": "vectors"},
        {"batch_size": 256},
    ),
    "paper": (_PAPER, {"name": "mnist"}, {"batch_size": 256}),
}


def get_config(variant: str = "digits") -> Config:
    """The configuration of a variant.

    Raises:
        InputError: there is no such variant.
    """
    return of_variant("neural_mixture", NeuralMixture, VARIANTS, variant)
