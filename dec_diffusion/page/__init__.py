"""The report of a run: one page that needs a browser and nothing else.

All of it is in the one file: pictures are embedded, the only script shows the example under the
pointer of the map, and a content policy forbids everything from elsewhere. The number of pictures
is bounded, so the page stays under `MAX_BYTES` whatever the data. It holds no date: the same run
gives the same page, up to the seconds that it took.

============  ===================================================================================
``assemble``  the page from its sections, and the file
``scores``    sections: the heading, the comparison with baselines, classes by cluster
``doubts``    section: what deserves doubt, and what to do about it
``cards``     section: the clusters, one by one
``map``       section: the learned features in two dimensions
``settings``  sections: the number of clusters, the search, settings; the command to repeat it
``embed``     pictures as data URIs
``words``     names and numbers as several sections write them
``markup``    elements of HTML
``template``  the document around the sections, its style and its script
============  ===================================================================================

Text is escaped where it is put in: only `Html`, which `tag` makes, goes in as it is. Names of
files, classes and runs are text.
"""

from dec_diffusion.page.assemble import MAX_BYTES, PAGE, build, write
from dec_diffusion.page.cards import MAX_CARDS, distinctive
from dec_diffusion.page.doubts import notices
from dec_diffusion.page.embed import sprite
from dec_diffusion.page.markup import escape
from dec_diffusion.page.settings import command
from dec_diffusion.page.words import baseline_name

__all__ = [
    "MAX_BYTES",
    "MAX_CARDS",
    "PAGE",
    "baseline_name",
    "build",
    "command",
    "distinctive",
    "escape",
    "notices",
    "sprite",
    "write",
]
