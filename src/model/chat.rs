//! A conversation laid through a model's own chat template, as transformers' `apply_chat_template`
//! lays it.
//!
//! The template is Jinja, which `minijinja` runs with what transformers' environment has beside
//! Jinja's own: Python's methods of texts, `raise_exception`, `strftime_now`, a `tojson` that is
//! Python's, and blocks of `generation`. A file may hold any template, so its steps and the
//! bytes that it makes are limited. What `minijinja` does otherwise than Python is in `chat_python`.
//! It knows neither files nor tokens.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use jiff::Zoned;
use jiff::civil::DateTime;
use jiff::fmt::strtime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, Value, context};
use regex::Regex;
use serde_json::Value as Json;

use super::chat_python::{self, Unlike, add_filters, as_python};
use super::error::shown;
use crate::text::grouped;

/// Steps that a template may take; `minijinja` counts some 64 bytes that it makes as one. Some
/// hundreds lay a message.
const MOST_STEPS: u64 = 1 << 20;
/// Bytes that a template may have; real ones have some thousands.
const LARGEST: usize = 1 << 20;

/// One message for a model, and what is said before it.
#[derive(Clone, Copy, Debug)]
pub struct Chat<'a> {
    /// The user's message.
    pub user: &'a str,
    /// The system's message, if there is one.
    pub system: Option<&'a str>,
    /// The local time, which a template may ask for.
    pub now: DateTime,
}

impl<'a> Chat<'a> {
    /// A message of now.
    pub fn now(user: &'a str, system: Option<&'a str>) -> Chat<'a> {
        Chat { user, system, now: Zoned::now().datetime() }
    }
}

/// A template, and what a model gives it beside the conversation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ChatTemplate {
    /// Where it stands, in words for errors.
    pub place: String,
    /// Its text.
    pub text: String,
    /// `bos_token` and the like.
    pub specials: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The text that the model reads, up to where it is to answer.
    ///
    /// # Errors
    /// In words, with the template's place and line.
    pub fn lay(&self, chat: &Chat<'_>) -> Result<String, String> {
        if self.text.len() > LARGEST {
            return Err(format!("its chat template ({}) is larger than 1 MiB", self.place));
        }
        let refusal = Arc::new(OnceLock::new());
        let environment = environment(chat.now, &refusal);
        // As Jinja reads a template: every end of a line is the same.
        let text = self.text.replace("\r\n", "\n").replace('\r', "\n");
        let text = with_plain_blocks(&text);
        let text = as_python(&text, syntax()).map_err(|unlike| match unlike {
            Unlike::Broken(error) => self.fault(&error, None),
            Unlike::Otherwise(line, what) => {
                let place = format!("its chat template ({}, line {line})", self.place);
                format!("{place} cannot be followed: {}", shown(&what))
            }
        })?;
        let laid = environment
            .template_from_named_str("chat template", &text)
            .and_then(|template| template.render(self.given(chat)));
        laid.map_err(|error| self.fault(&error, refusal.get()))
    }

    /// The template's variables.
    fn given(&self, chat: &Chat<'_>) -> Value {
        let message = |role: &str, content: &str| context! { role => role, content => content };
        let mut messages: Vec<Value> = Vec::new();
        messages.extend(chat.system.map(|text| message("system", text)));
        messages.push(message("user", chat.user));
        let mut given: BTreeMap<&str, Value> = self
            .specials
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())))
            .collect();
        given.insert("messages", Value::from(messages));
        given.insert("tools", Value::from(()));
        given.insert("documents", Value::from(()));
        given.insert("add_generation_prompt", Value::from(true));
        Value::from(given)
    }

    fn fault(&self, error: &Error, refusal: Option<&String>) -> String {
        let line = error.line().map_or(String::new(), |line| format!(", line {line}"));
        let place = format!("its chat template ({}{line})", self.place);
        if let Some(message) = refusal {
            return format!("{place} refuses the conversation: {}", shown(message));
        }
        match error.kind() {
            ErrorKind::OutOfFuel => {
                format!("{place} takes more than {} steps", grouped(MOST_STEPS as usize))
            }
            kind => {
                let detail = error.detail().map_or(String::new(), |text| format!(": {text}"));
                format!("{place} cannot be followed: {kind}{}", shown(&detail))
            }
        }
    }
}

/// How transformers' environment reads a template.
fn syntax() -> SyntaxConfig {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    syntax.expect("the delimiters are Jinja's own")
}

/// What transformers' environment does.
fn environment(now: DateTime, refusal: &Arc<OnceLock<String>>) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MOST_STEPS));
    environment.set_formatter(python_form);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    let refusal = Arc::clone(refusal);
    environment.add_function("raise_exception", move |message: String| -> Result<Value, Error> {
        let _ = refusal.set(message);
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception"))
    });
    environment.add_function("strftime_now", move |format: &str| -> Result<String, Error> {
        let failed =
            |error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
        strtime::format(format, now).map_err(failed)
    });
    add_filters(&mut environment);
    environment.add_filter("tojson", to_json);
    // Of Python a text is a sequence, and what is not there is an empty one.
    let is_sequence = |value: &Value| {
        let kind = value.kind();
        matches!(kind, ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map)
    };
    environment.add_test("sequence", move |value: &Value| is_sequence(value));
    environment.add_test("iterable", move |value: &Value| {
        is_sequence(value) || value.kind() == ValueKind::Iterable
    });
    environment
}

/// The template without transformers' own blocks, which mark what the model said and write
/// nothing themselves.
fn with_plain_blocks(text: &str) -> String {
    static BLOCKS: OnceLock<Option<[Regex; 2]>> = OnceLock::new();
    let blocks = BLOCKS.get_or_init(|| {
        let block = |name| Regex::new(&format!(r"\{{%([-+]?)\s*{name}\s*([-+]?)%\}}")).ok();
        Some([block("generation")?, block("endgeneration")?])
    });
    let Some([begin, end]) = blocks else { return text.to_owned() };
    let text = begin.replace_all(text, "{%${1} with ${2}%}");
    end.replace_all(&text, "{%${1} endwith ${2}%}").into_owned()
}

/// How Python writes what a template prints.
fn python_form(
    out: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String => minijinja::escape_formatter(out, state, value),
        _ => out.write_str(&chat_python::text(value)?).map_err(Error::from),
    }
}

/// Python's `json.dumps` without escapes of what is not ASCII.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    options.assert_all_used()?;
    if ascii {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson with `ensure_ascii`"));
    }
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = String::new();
    write_json(&json, indent.map(|width| width.min(64)), sorted, 0, &mut text);
    Ok(text)
}

fn write_json(json: &Json, indent: Option<usize>, sorted: bool, depth: usize, text: &mut String) {
    let line = |text: &mut String, depth: usize| {
        if let Some(width) = indent {
            text.push('\n');
            text.push_str(&" ".repeat(width * depth));
        }
    };
    let between = if indent.is_some() { "," } else { ", " };
    match json {
        Json::Array(values) if !values.is_empty() => {
            text.push('[');
            for (place, value) in values.iter().enumerate() {
                text.push_str(if place > 0 { between } else { "" });
                line(text, depth + 1);
                write_json(value, indent, sorted, depth + 1, text);
            }
            line(text, depth);
            text.push(']');
        }
        Json::Object(map) if !map.is_empty() => {
            let mut entries: Vec<(&String, &Json)> = map.iter().collect();
            if sorted {
                entries.sort_by_key(|(key, _)| *key);
            }
            text.push('{');
            for (place, (key, value)) in entries.into_iter().enumerate() {
                text.push_str(if place > 0 { between } else { "" });
                line(text, depth + 1);
                text.push_str(&Json::from(key.as_str()).to_string());
                text.push_str(": ");
                write_json(value, indent, sorted, depth + 1, text);
            }
            line(text, depth);
            text.push('}');
        }
        Json::Number(float) if float.is_f64() => {
            text.push_str(&chat_python::number(float.as_f64().unwrap_or(f64::NAN)));
        }
        plain => text.push_str(&plain.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::date;

    use super::*;

    fn lay(text: &str, system: Option<&str>) -> Result<String, String> {
        let specials = [("bos_token".to_owned(), "<s>".to_owned())].into();
        let template = ChatTemplate { place: "here".to_owned(), text: text.to_owned(), specials };
        template.lay(&Chat {
            user: "Say \"\u{e9}\".\n",
            system,
            now: date(2026, 7, 4).at(9, 5, 0, 0),
        })
    }

    fn text(template: &str) -> String {
        lay(template, None).expect("a text")
    }

    fn fault(template: &str) -> String {
        let laid = lay(template, None).map(|text| text.len());
        laid.expect_err("a fault")
    }

    #[test]
    fn ends_of_lines_in_a_template_are_all_the_same_and_those_of_a_message_stay() {
        let template = "a\r\n{{ messages[0]['content'] }}\rb";
        assert_eq!(text(template), "a\nSay \"\u{e9}\".\n\nb");
        let with = lay("{{ messages[0]['content'] }}\r\n", Some("x\r\ny"));
        assert_eq!(with.expect("a text"), "x\r\ny");
    }

    #[test]
    fn python_s_forms_and_methods_are_reproduced() {
        for (template, expected) in [
            ("{{ bos_token }}{{ true }} {{ tools }} {{ nothing }}{{ 3 }}", "<s>True None 3"),
            ("{{ messages[0].content | tojson }}", r#""Say \"é\".\n""#),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": "Say \"é\".\n"}]"#),
            (
                "{{ {'b': [1, 2], 'a': {}} | tojson(indent=2) }}",
                "{\n  \"b\": [\n    1,\n    2\n  ],\n  \"a\": {}\n}",
            ),
            (
                "{{ messages[0]['content'].strip().split(' ')[-1].replace('.', '!') }}",
                "\"\u{e9}\"!",
            ),
            ("{{ strftime_now('%d %b %Y') }} {{ strftime_now('%-d/%m') }}", "04 Jul 2026 4/07"),
            ("{{ 'x' is sequence }}{{ 'x' is iterable }}{{ 3 is iterable }}", "TrueTrueFalse"),
            (
                "{% for i in range(9) %}\n{% if i == 2 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\n",
                "0\n1\n",
            ),
            ("a\n   {%- generation -%}\n b {% set x = 1 %}{% endgeneration %}\nc\n", "ab c"),
            ("{{ messages[0].get('name', 'none') }}{{ messages|length }}", "none1"),
            (
                "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = 2 %}{% endfor %}{{ ns.x }}",
                "2",
            ),
        ] {
            assert_eq!(text(template), expected, "{template}");
        }
    }

    /// Each as jinja2 3.1.6 lays it in transformers' environment.
    #[test]
    fn numbers_loops_and_concatenations_are_python_s() {
        for (template, expected) in [
            (
                "{{ 1e16 }} {{ 1e15 }} {{ 0.0001 }} {{ 0.00001 }} {{ 1e22 }} {{ -2.5e-7 }} \
                 {{ 123456789012345678.0 }} {{ 2.0 }} {{ 1/3 }} {{ 1e308 * 10 }}",
                "1e+16 1000000000000000.0 0.0001 1e-05 1e+22 -2.5e-07 1.2345678901234568e+17 2.0 \
                 0.3333333333333333 inf",
            ),
            (
                "{{ '' ~ 1e16 ~ ' ' ~ 0.00001 ~ true ~ none ~ nothing ~ 3 }}|{{ (1 + 2) ~ 'a' ~ \
                 ('b'|upper) ~ 'c'|upper ~ -1 ~ (1 == 1) ~ (1 if 0 else 2.0) }}",
                "1e+16 1e-05TrueNone3|3aBC-1True2.0",
            ),
            (
                "{{ 1e16|string }} {{ [1e16, 1, 'x', none]|join('-') }} {{ 'abc'|join('.') }} \
                 {{ messages|map(attribute='role')|join(', ') }}",
                "1e+16 1e+16-1-x-None a.b.c user",
            ),
            ("{{ [1e16, 1e-7, 2.0, 0.1] | tojson }}", "[1e+16, 1e-07, 2.0, 0.1]"),
            (
                "{% for c in 'h\u{e9}y' %}{{ c }}{{ loop.index }}{{ loop.last }}{{ loop.length }}\
                 {{ loop.revindex }}{% endfor %}",
                "h1False33\u{e9}2False32y3True31",
            ),
            (
                "{% for c in messages[0].content if c != ' ' %}{{ loop.length }}{{ c }}\
                 {% if not loop.last %},{% endif %}{% else %}none{% endfor %}",
                "8S,8a,8y,8\",8\u{e9},8\",8.,8\n",
            ),
            (
                "{% for x in messages | selectattr('role', 'equalto', 'user') %}{{ loop.length }}\
                 {{ loop.last }}{% endfor %}",
                "1True",
            ),
            (
                "{% for x in ([3] if messages is defined else [4, 5]) %}{{ x }}{{ loop.length }}\
                 {% endfor %}",
                "31",
            ),
            (
                "{% for k, v in {'a': 1, 'b': 2.0}.items() %}{{ k ~ '=' ~ v }}{{ loop.last }}\
                 {% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}{% for x in nothing %}{{ x }}\
                 {% endfor %}{% for x in range(2) %}{{ x }}{% endfor %}",
                "a=1Falseb=2.0Truea01",
            ),
            (
                "{% macro f(a, b='x' ~ 1.0) %}{{ a ~ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}",
                "1x1.012",
            ),
            ("{{ 'x' is defined ~ 'y' }}{{ not 'a' ~ 'b' }}", "TrueyFalse"),
            ("{% set x = 'a' ~ 'b'|length ~ 'c' is string %}{{ x }}", "a1True"),
            (
                "{{ ('a' ~ 'b')|upper ~ messages[0]['content'][:2] ~ messages[0].content.strip()[-1] \
                 ~ {'k': 'v'}['k'] ~ [1, 2][0] }}",
                "ABSa.v1",
            ),
            ("{{ (1 ~ 2) ~ (3 ~ 4) ~ 5 * 2 ~ 7 // 2 ~ 2 ** 3 ~ 7 / 2 }}", "123410383.5"),
            (
                "{{ 'a' in 'b' ~ 'a' }}{{ 'b' ~ 'a' == 'ba' }}{{ 'x' if 'a' ~ '' else 'y' ~ 'z' }}",
                "TrueTruex",
            ),
            ("{%- for c in 'ab' -%}\n {{- c ~ loop.last -}}\n{%- endfor -%}", "aFalsebTrue"),
            (
                "{% filter upper %}{{ 'a' ~ 1.5 }}{% endfilter %}{% with x = 'a' ~ 2.0 %}{{ x }}\
                 {% endwith %}{% set y %}{{ 'q' ~ 1 }}{% endset %}{{ y ~ y }}",
                "A1.5a2.0q1q1",
            ),
        ] {
            assert_eq!(text(template), expected, "{template}");
        }
    }

    #[test]
    fn what_python_would_lay_otherwise_is_refused() {
        for (template, expected) in [
            (
                "\n{% macro f(a, b=a) %}{{ b }}{% endmacro %}{{ f(1) }}",
                "(here, line 2) cannot be followed: a default of the macro `f` is made of its \
                 argument `a`",
            ),
            ("{% macro f(a, b=[1 ~ a.x]) %}{% endmacro %}", "of its argument `a`"),
            ("{{ '' ~ messages }}", "a list or an object as Python writes it"),
            ("{{ [[1]] | join }}", "a list or an object as Python writes it"),
        ] {
            let said = fault(template);
            assert!(said.contains(expected), "{template}: {said}");
        }
        for chain in [" ~ 'x'", "|trim", ".x", "[0]", "()", " is defined", " if 1", " + 1"] {
            let said = fault(&format!("{{{{ 'x'{} }}}}", chain.repeat(20_000)));
            assert!(said.contains("more than 500 operators in one tag"), "{chain}: {said}");
        }
        let said = fault(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(20_000)));
        assert!(said.contains("more than 500 `elif`s"), "{said}");
        assert_eq!(text(&format!("{{{{ 'x'{} }}}}", " ~ 'x'".repeat(400))), "x".repeat(401));
    }

    #[test]
    fn what_a_template_may_not_do_is_told_with_its_line() {
        for (template, expected) in [
            ("\n{{ raise_exception('no\u{1b}') }}", "(here, line 2) refuses the conversation: no"),
            (
                "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
                "takes more than 1,048,576 steps",
            ),
            (
                "{% set n = namespace(x='12345678') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
                "takes more than 1,048,576 steps",
            ),
            (
                "{% set x = 'x' * 9999999 %}{% for a in range(9) %}{{ x }}{% endfor %}",
                "takes more than 1,048,576 steps",
            ),
            ("{% include 'x' %}", "cannot be followed"),
            (
                "\n\n{{ messages[0].content | urlize }}",
                "(here, line 3) cannot be followed: unknown filter",
            ),
            ("{{ messages }}", "as Python writes it"),
            ("{% if %}", "cannot be followed: syntax error"),
            ("{{ nothing.content }}", "undefined"),
        ] {
            let said = fault(template);
            assert!(said.contains(expected), "{template}: {said}");
        }
        let deep = format!("{{{{ {}1{} }}}}", "(".repeat(9000), ")".repeat(9000));
        assert!(fault(&deep).contains("cannot be followed"));
    }

    #[test]
    fn a_system_message_comes_before_the_user_s() {
        let template = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}";
        assert_eq!(
            lay(template, Some("Be brief.")).expect("a text"),
            "system:Be brief.;user:Say \"\u{e9}\".;"
        );
    }
}
