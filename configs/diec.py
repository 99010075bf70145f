"""DiEC (arXiv 2512.20905): clusters from the inner features of a diffusion model.

    python -m dec_diffusion.main --config=configs/diec.py[:variant] [--config.a.b=value ...]

| variant | data                                   | needs                                  |
| ------- | -------------------------------------- | -------------------------------------- |
| digits  | scikit-learn's 1,797 digits, 8x8       | nothing                                |
| usps    | 9,298 images of 16x16                  | --config.data.path=usps.h5, h5py       |
| mnist   | all 70,000 of MNIST                    | --config.data.path=DIR, an accelerator |
| fashion | all 70,000 of Fashion-MNIST            | --config.data.path=DIR, an accelerator |
| cifar10 | all 60,000 of CIFAR-10                 | --config.data.path=DIR, an accelerator |
| images  | a folder or an array of images         | --config.data.path=PATH                |
| vectors | a table or an array of vectors         | --config.data.path=FILE                |
| paper   | MNIST, as version 1 describes the      | --config.data.path=DIR, an accelerator |
|         | search: bottleneck, golden section     |                                        |

Measured (mean and standard deviation over seeds 0 to 4, no selection, labels for scoring only):

digits      ACC .953 +- .003, NMI .921 +- .006, ARI .901 +- .007; k-means at the chosen cell .920,
            .871. The first run takes 2 min 33 s and 2.0 GiB on two idle cores
usps        seeds 0 to 2: ACC .970 +- .003, NMI .924 +- .003, ARI .942 +- .004; k-means at the
            chosen cell .680, .748, on the pixels .668, .627; 18 to 21 min on one core of two
mnist       not with these settings; with 16 channels and 2,000 steps on one CPU core, seed 0, ACC
            .965, NMI .911 (docs/diec.md)
images      MNIST's 10,000 test images, seed 0: ACC .931, NMI .850, ARI .856 (communities at its
            timestep .935, .858), 54 min on one core of two that other work shared; take more
            channels where an accelerator is at hand: --config.method.width=32
the others  not measured

A denoiser that is trained already is taken with --config.pretrained=DIR: the workdir of another
run of this config, or a folder of Hugging Face diffusers that holds a UNet2DModel.
"""

from dec_diffusion.config import Config, Variants, of_variant
from dec_diffusion.methods.diec import DiEC

# An iteration is one pass over the data.
_LARGE = {
    "width": 64,
    "steps": 0,
    "pretrain_iterations": 60,
    "iterations": 20,
    "pretrain_rate": 5e-4,
    "dims": 32,
}

_PHOTOS = {
    "width": 128,
    "multipliers": (1, 2, 2, 2),
    "blocks": 2,
    "attention": (1,),
    "dtype": "bfloat16",
    "steps": 0,
    "pretrain_iterations": 400,
    "iterations": 30,
    "pretrain_rate": 2e-4,
    "ema": 0.9995,
    "dims": 64,
}

# The first version fixes the layer and narrows the timestep down by the plain index; whatever is
# not known of it (pooling among it) is the reflex choice. See docs/diec.md for what that costs.
_PAPER = _LARGE | {
    "layer": "middle",
    "start": "kmeans",
    "strategy": "golden",
    "score": "chi",
    "largest_timestep": 1.0,
    "pool": "average",
    "whiten": False,
    "unit": False,
    "dims": 64,
}

VARIANTS: Variants = {
    "digits": ({}, {"name": "digits"}, {"evaluate_every": 1}),
    "usps": (
        {"steps": 0, "pretrain_iterations": 25, "iterations": 8, "balance": 0.0},
        {"name": "usps"},
        {},
    ),
    "mnist": (_LARGE, {"name": "mnist"}, {"batch_size": 256}),
    "fashion": (_LARGE, {"name": "fashion-mnist"}, {"batch_size": 256}),
    "cifar10": (_PHOTOS, {"name": "cifar10"}, {"batch_size": 256}),
    "images": ({"width": 8}, {"name": "array", "kind": "images"}, {}),
    "vectors": (
        {"width": 256, "pretrain_rate": 1e-3, "start": "kmeans"},
        {"name": "array", "kind": "vectors"},
        {},
    ),
    "paper": (_PAPER, {"name": "mnist"}, {"batch_size": 256}),
}


def get_config(variant: str = "digits") -> Config:
    """The configuration of a variant.

    Raises:
        InputError: there is no such variant.
    """
    return of_variant("diec", DiEC, VARIANTS, variant)
