"""Checks an OpenAPI document, read from standard input, against the specification."""

import json
import sys

from openapi_spec_validator import OpenAPIV31SpecValidator

problems = list(OpenAPIV31SpecValidator(json.load(sys.stdin)).iter_errors())
for problem in problems:
    print(f"{problem.json_path}: {problem.message}")
sys.exit(1 if problems else 0)
