"""The page that shows the record of a run; needs jinja2 and matplotlib."""
