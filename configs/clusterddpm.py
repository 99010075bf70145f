"""ClusterDDPM. PLACEHOLDER DOC"""

from dec_diffusion.config import Config
from dec_diffusion.methods.clusterddpm import ClusterDDPM


def get_config(variant: str = "digits") -> Config:
    """The configuration of a variant."""
    return Config(name=f"clusterddpm-{variant}", method=ClusterDDPM())
