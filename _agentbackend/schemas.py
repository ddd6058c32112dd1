"""JSON Schema files and the errors they find."""
import itertools
import json
from pathlib import Path

import jsonschema
import referencing

from _agentbackend.errors import ValidationError, either, kind_of, quoted

MAX_ERRORS = 10
MAX_TEXT = 400  # characters of a headline, beside the names of further fields
MAX_NAME = 80  # characters of a field's name, which may be one that the client made up
MAX_DIGITS = 400
KINDS = {'null': 'null', 'boolean': 'true or false', 'integer': 'a whole number', 'number': 'a number',
         'string': 'a text', 'array': 'a list', 'object': 'an object'}
LIMITS = {'exclusiveMinimum': 'above', 'minimum': 'from', 'maximum': 'up to'}
# What is said of a value by the keyword that it does not fit; behind the name of its field it is a sentence.
SENTENCES = {
    'type': 'is {given}, but has to be {kinds}{such}',
    'enum': 'is {given}, but has to be {choice}',
    'minimum': 'is {given}, but has to be {limits}', 'maximum': 'is {given}, but has to be {limits}',
    'exclusiveMinimum': 'is {given}, but has to be {limits}',
    'pattern': 'is {given}, but {description}', 'not': 'is {given}, but {description}',
    'minLength': 'is empty', 'minItems': 'is empty',
    'maxLength': 'has {size:,} characters, but at most {wanted:,} are taken',
    'maxItems': 'has {size:,} entries, but at most {wanted:,} are taken',
    'maxProperties': 'has {size:,} entries, but at most {wanted:,} are taken',
    'minProperties': 'is empty, but needs {known}',
    'uniqueItems': 'has the same entry twice',
}


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

    def properties(self, name):
        """Return [(name of a field, its schema)] of the fields of a schema, those of other files included."""
        found = []
        for field, schema in self.documents[name].get('properties', {}).items():
            file, _, fragment = schema.get('$ref', '').partition('#')
            place = self.documents[file.removesuffix('.json') or name] if fragment else {}
            for part in fragment.split('/')[1:]:
                place = place[part]
            found.append((field, place | schema))
        return found

    def check(self, name, value, *, where='body'):
        """Raise ValidationError with every error of `value` as {path, message}, unless it fits schema
        `name`."""
        try:
            # A value may have as many errors as it has parts: no more of them are looked for than are told.
            errors = list(itertools.islice(self._validators[name].iter_errors(value), MAX_ERRORS))
            found = {complaint for error in errors for complaint in complaints(error, f'the {where}')}
        except RecursionError as error:  # lists are compared part by part
            raise ValidationError(f'Invalid {where}: it is nested too deeply') from error
        if found:
            details = [{'path': path, 'message': message}
                       for path, message in sorted(found)[:MAX_ERRORS]]
            raise ValidationError(f'Invalid {where}: {headline(details)}', details=details)


def headline(details):
    """Return all that is wrong as one text: in sentences while there is room, then by the names of the
    fields."""
    text, *more = [item['message'] for item in details]
    while more and len(text) + len(more[0]) < MAX_TEXT:
        text = f'{text}; {more.pop(0)}'
    rest = [item['path'][:MAX_NAME] for item in details[len(details) - len(more):]]
    return f"{text}; also wrong: {', '.join(rest)}" if rest else text


def complaints(error, whole):
    """Yield (path, sentence) of what an error of jsonschema is about; `whole` is what the value itself is
    called."""
    path, value, wanted = list(error.absolute_path), error.instance, error.validator_value

    def about(words, *more):
        name = '.'.join(str(part)[:MAX_NAME] for part in [*path, *more])
        return name, f'{(name if name.isprintable() else quoted(name)) or whole} {words}'

    if error.validator == 'required':
        yield from (about('is missing', field) for field in wanted if field not in value)
    elif error.validator == 'additionalProperties':
        known = error.schema.get('properties', {})
        hint = f" (known: {', '.join(known)})" if known else ''
        for field in itertools.islice((field for field in value if field not in known), MAX_ERRORS):
            yield about(f'is unknown here{hint}', field)
            hint = ''
    elif error.validator == 'oneOf':  # and a type that tells which of them it has to be
        yield from complaints_of_one(error, whole)
    elif error.validator != 'type' or 'enum' not in error.schema:  # which says the same better
        name, text = about(sentence(error, is_whole=not path))
        yield name, f'a name in {text}' if 'propertyNames' in error.absolute_schema_path else text


def complaints_of_one(error, whole):
    """Yield what `complaints` does, of a value that can be one of several things."""
    key, kinds = error.schema['discriminator']['propertyName'], [*error.schema['discriminator']['mapping']]
    if not isinstance(error.instance, dict):
        return  # which is an error of its own
    if key not in error.instance:
        yield key, f'{key} is missing'
    elif error.instance[key] not in kinds:
        yield key, f'{key} is {quoted(error.instance[key])}, but has to be {either(kinds)}'
    else:
        for item in error.context:
            if item.schema_path[0] == kinds.index(error.instance[key]):
                yield from complaints(item, whole)


def sentence(error, *, is_whole):
    """Return what is said of a value behind its name. A secret is not quoted, nor what may hold one."""
    schema, value, types = error.schema, error.instance, error.schema.get('type', [])
    is_secret = is_whole or schema.get('writeOnly')
    if is_secret and error.validator == 'pattern':
        return f"does not fit: {schema['description']}"
    unit = f" of {schema['format']}" if 'format' in schema else ''
    kinds = [KINDS[kind] + (unit if kind in ('integer', 'number') else '')
             for kind in ([types] if isinstance(types, str) else types)]
    limits = [f'{words} {schema[key]:,}' for key, words in LIMITS.items() if key in schema]
    return SENTENCES[error.validator].format(
        given=kind_of(value) if is_secret else quoted(value), kinds=either(kinds),
        such=f", such as {json.dumps(schema['examples'][0])}" if 'examples' in schema else '',
        limits=' '.join(limits) + unit.replace(' of', ''), choice=either(schema.get('enum', ())),
        description=schema.get('description'), known=either(schema.get('properties', ())),
        size=len(value) if isinstance(value, (str, list, dict)) else 0, wanted=error.validator_value)


def parse_json(data):
    """Return the value of JSON bytes; raise ValidationError for anything that is not strictly JSON."""
    def refuse(word):
        raise ValueError(f'{word} is no JSON value')

    def whole(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f'a number has more than {MAX_DIGITS} digits')
        return int(text)

    def number(text):
        value = float(text)
        # 80.0 is the integer 80 to JSON Schema, so let it be one to us.
        return int(value) if value.is_integer() else value
    try:
        value = json.loads(data.decode('utf-8'), parse_constant=refuse, parse_int=whole,
                           parse_float=number)
        if b'\\u' in data:
            # Half of a surrogate pair could never be sent again.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise ValidationError('This is not valid JSON: it is nested too deeply.') from error
    except UnicodeError as error:
        raise ValidationError('This is not valid JSON: a character of it is not valid in UTF-8.') from error
    except json.JSONDecodeError as error:
        said = f'{error.msg[0].lower()}{error.msg[1:]} (line {error.lineno}, column {error.colno})'
        said = said if data.strip() else 'it is empty'
        raise ValidationError(f'This is not valid JSON: {said}.') from error
    except ValueError as error:
        raise ValidationError(f'This is not valid JSON: {error}.') from error
