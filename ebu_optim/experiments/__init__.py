"""Which experiments stand behind the claims: runs as data, what is missing made, and their tables.

`runs` makes runs, `worlds` and `text_worlds` say what a run is in a setting, `rows` which methods
at which strengths, `tables` and `text_tables` gather the runs in a report; `options` and
`text_options` are what a command takes. examples/paper has a script for each table and figure.
"""

from .._extras import require

require("accelerate", "examples")
