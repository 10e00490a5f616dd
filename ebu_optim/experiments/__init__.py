"""The experiments behind the claims: runs as data, and their tables. Missing runs are made.

`runs` makes runs. `worlds` and `text_worlds` define a run in a setting, `rows` the methods and
their strengths. `tables` and `text_tables` gather the runs in a report. `options` and
`text_options` are the options of the commands. examples/paper has a script for each table and
figure.
"""

from .._extras import require

require("accelerate", "examples")
