#!/bin/sh
# The command inside the image, where the sources are not installed.
PYTHONPATH=/app exec /opt/tidemeter/bin/python -m services.cli.main "$@"
