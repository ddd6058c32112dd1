"""JSON Schema files and the errors they find."""
import itertools
import json
from pathlib import Path

import jsonschema
import referencing

from _agentbackend.errors import ValidationError

MAX_ERRORS = 10
MAX_MESSAGE = 300  # characters: jsonschema quotes the whole instance


class Schemas:
    """The JSON Schema files of a folder, compiled once, by their names without the ending."""

    def __init__(self, folder):
        self.documents = {path.stem: json.loads(path.read_text())
                          for path in sorted(Path(folder).glob('*.json'))}
        registry = referencing.Registry().with_resources(
            (f'{name}.json', referencing.Resource.from_contents(document))
            for name, document in self.documents.items())
        self._validators = {name: jsonschema.Draft202012Validator({'$ref': f'{name}.json'}, registry=registry)
                            for name in self.documents}

    def check(self, name, value, *, where='body'):
        """Raise ValidationError with every error of `value` as {path, message}, unless it fits schema
        `name`."""
        try:
            # A value may have as many errors as it has parts: no more of them are looked for than are told.
            errors = sorted(itertools.islice(self._validators[name].iter_errors(value), MAX_ERRORS),
                            key=lambda error: list(map(str, error.absolute_path)))
            details = [{'path': '.'.join(map(str, error.absolute_path)), 'message': self._sentence(error)}
                       for error in errors]
        except RecursionError as error:  # lists are compared, and quoted, part by part
            raise ValidationError(f'Invalid {where}: it is nested too deeply') from error
        if not details:
            return
        first = details[0]
        text = f"{first['path']}: {first['message']}" if first['path'] else first['message']
        raise ValidationError(f'Invalid {where}: {text}', details=details)

    @staticmethod
    def _sentence(error):
        if error.validator == 'additionalProperties' and error.validator_value is False:
            known = error.schema.get('properties', {})
            unknown = [repr(key)[:80] for key in itertools.islice((key for key in error.instance
                                                                   if key not in known), 4)]
            named = ', '.join(unknown[:3]) + (' and others' if unknown[3:] else '')
            return f"unknown field {named}; known are {', '.join(known) or 'none'}"
        if error.validator in ('pattern', 'not', 'maxLength') and 'description' in error.schema:
            value = repr(error.instance)
            value = value if len(value) < 80 else value[:77] + '...'
            return f"{value} does not fit: {error.schema['description']}"
        return error.message if len(error.message) <= MAX_MESSAGE else error.message[:MAX_MESSAGE - 3] + '...'


def parse_json(data):
    """Return the value of JSON bytes; raise ValidationError for anything that is not strictly JSON."""
    def refuse(word):
        raise ValueError(f'{word} is no JSON value')

    def number(text):
        value = float(text)
        # 80.0 is the integer 80 to JSON Schema, so let it be one to us.
        return int(value) if value.is_integer() else value
    try:
        value = json.loads(data.decode('utf-8'), parse_constant=refuse, parse_float=number)
        if b'\\u' in data:
            # Half of a surrogate pair could never be sent again.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValidationError(f'This is not valid JSON: {error}.') from error
