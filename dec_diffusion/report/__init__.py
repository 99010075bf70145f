"""Pictures of a clustering, as PNG files.

Each function draws one picture and writes one file. No display is needed and no global state of
matplotlib is changed: figures are built as objects, never through ``pyplot``, so pictures may be
drawn in threads and inside notebooks. The same input and seed give the same file.

============  ===================================================================================
``grids``     images: members of every cluster, generated ones, rows of any
``latent``    the latent space in two dimensions
``history``   metrics over the steps of a run
``tables``    heat maps: classes by clusters, the clusters' means
``choices``   what was chosen without labels: a cell of a search, a number of clusters
``tiles``     images side by side on one canvas, for ``grids`` and the page
``style``     what all of them share: colours, figures, checks, the file written
============  ===================================================================================

Cluster k has the same colour in every picture, whatever the number of clusters (`cluster_colour`).
Labels are only ever drawn beside the result, and the picture says so.

``path`` is a string or anything with ``write_bytes`` (``pathlib``, ``etils.epath``); the folder
must exist. Images are [.., h, w, c] with values in [0, 1] (or uint8); values outside are clipped
and non-finite pixels drawn magenta, since a report should show a defect and not hide or die of it.
One channel is grey, two are averaged, of more the first three are red, green and blue.
"""

from dec_diffusion.report.choices import choice_of_clusters, search_map
from dec_diffusion.report.grids import (
    generated_by_cluster,
    image_row,
    images_by_cluster,
    members_to_show,
)
from dec_diffusion.report.history import curves
from dec_diffusion.report.latent import Layout, latent_map, lay_out, project
from dec_diffusion.report.style import MAX_ROWS, cluster_colour
from dec_diffusion.report.tables import centres, confusion
from dec_diffusion.report.tiles import compose_grid, tile_origin

__all__ = [
    "MAX_ROWS",
    "Layout",
    "centres",
    "choice_of_clusters",
    "cluster_colour",
    "compose_grid",
    "confusion",
    "curves",
    "generated_by_cluster",
    "image_row",
    "images_by_cluster",
    "latent_map",
    "lay_out",
    "members_to_show",
    "project",
    "search_map",
    "tile_origin",
]
