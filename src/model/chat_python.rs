//! What Python's Jinja makes of a template and `minijinja` alone would not: texts of numbers, loops
//! over a text, defaults of macros.
//!
//! `minijinja` concatenates (`~`) and joins by Rust's own words for a number, and counts the characters
//! of a text only while it loops over them. Nothing of that can be set, so the template's operands
//! are given to filters that write and count as Python does. What cannot be had that way is
//! refused. It knows no model and no conversation.

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Macro, Stmt, UnaryOpKind};
use minijinja::machinery::{Span, Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};

/// The filter that writes a value as Python's `str` does.
const TEXT: &str = "runner_text";
/// The same of each value of a list.
const TEXTS: &str = "runner_texts";
/// The filter that makes a list of a text's characters.
const ITEMS: &str = "runner_items";

/// Operators that one tag of a template may have, and branches that all of it may have: each is a
/// step of a recursion in the library. Real templates have some tens.
const MOST_OPERATORS: usize = 500;

/// Why a template cannot be followed as Python follows it.
pub(super) enum Unlike {
    /// It cannot be followed at all.
    Broken(Error),
    /// The line, and what is otherwise there.
    Otherwise(usize, String),
}

/// Filters that templates of [`as_python`] use, and one that writes as Python does.
pub(super) fn add_filters(environment: &mut Environment<'_>) {
    environment.add_filter(TEXT, |value: &Value| text(value));
    environment.add_filter("string", |value: &Value| text(value));
    environment.add_filter(TEXTS, |value: Value| match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let texts: Result<Vec<String>, Error> =
                value.try_iter()?.map(|item| text(&item)).collect();
            texts.map(Value::from)
        }
        _ => Ok(value),
    });
    environment.add_filter(ITEMS, |value: Value| match value.kind() {
        ValueKind::String | ValueKind::Iterable => {
            Ok::<Value, Error>(value.try_iter()?.collect::<Vec<Value>>().into())
        }
        _ => Ok(value),
    });
}

/// A value as Python's `str` writes it.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::None => Ok("None".to_owned()),
        ValueKind::Bool => Ok(if value.is_true() { "True" } else { "False" }.to_owned()),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            Err(Error::new(
                ErrorKind::InvalidOperation,
                "it writes a list or an object as Python writes it, which is not done here",
            ))
        }
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map(number).map_err(|_| {
                Error::new(ErrorKind::InvalidOperation, "it writes a number that is no float")
            })
        }
        _ => Ok(value.to_string()),
    }
}

/// A float as Python writes it: the fewest digits that read back as it, with an exponent below
/// 1e-4 and from 1e16 on.
pub(super) fn number(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    let digits = format!("{value:e}");
    let Some((digits, exponent)) = digits.split_once('e') else { return digits };
    match exponent.parse::<i32>() {
        Ok(exponent) if value != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => {
            let plain = value.to_string();
            if plain.contains('.') { plain } else { plain + ".0" }
        }
    }
}

/// The template whose texts and loops are Python's.
///
/// # Errors
/// If it is no template, or Python would follow it otherwise.
pub(super) fn as_python(template: &str, syntax: SyntaxConfig) -> Result<String, Unlike> {
    check_depth(template, syntax.clone())?;
    let parsed = parse(template, "chat template", syntax).map_err(Unlike::Broken)?;
    let mut wraps = Vec::new();
    // Without recursion: a chain of operators may be as long as the template.
    let mut open = vec![Node::Stmt(&parsed)];
    while let Some(node) = open.pop() {
        match node {
            Node::Stmt(stmt) => visit_stmt(stmt, &mut open, &mut wraps)?,
            Node::Expr(expr) => visit_expr(expr, &mut open, &mut wraps),
        }
    }
    Ok(wrapped(template, wraps))
}

/// Refuses what would lead the library's recursion too deep.
fn check_depth(template: &str, syntax: SyntaxConfig) -> Result<(), Unlike> {
    let (mut operators, mut branches, mut opens) = (0, 0, false);
    for token in tokenize(template, false, syntax) {
        let (token, span) = token.map_err(Unlike::Broken)?;
        let is_branch = opens && matches!(token, Token::Ident("elif"));
        opens = matches!(token, Token::BlockStart);
        match token {
            Token::BlockStart | Token::VariableStart => operators = 0,
            Token::Ident("elif") if is_branch => branches += 1,
            Token::Ident("is" | "and" | "or" | "not" | "in" | "if" | "else")
            | Token::Plus
            | Token::Minus
            | Token::Mul
            | Token::Div
            | Token::FloorDiv
            | Token::Pow
            | Token::Mod
            | Token::Tilde
            | Token::Dot
            | Token::Pipe
            | Token::BracketOpen
            | Token::ParenOpen
            | Token::BraceOpen => operators += 1,
            _ => {}
        }
        if operators.max(branches) > MOST_OPERATORS {
            let what = if branches > operators { "`elif`s" } else { "operators in one tag" };
            return Err(Unlike::Otherwise(
                span.start_line.into(),
                format!("it has more than {MOST_OPERATORS} {what}"),
            ));
        }
    }
    Ok(())
}

enum Node<'t, 's> {
    Stmt(&'t Stmt<'s>),
    Expr(&'t Expr<'s>),
}

/// An expression that is given to a filter: where it begins and ends.
struct Wrap {
    start: usize,
    end: usize,
    filter: &'static str,
}

impl Wrap {
    fn of(expr: &Expr<'_>, filter: &'static str) -> Wrap {
        Wrap { start: start(expr), end: expr.span().end_offset as usize, filter }
    }
}

fn wrapped(template: &str, wraps: Vec<Wrap>) -> String {
    // Of two that end together the inner one, which begins later, closes first.
    let mut marks: Vec<(usize, std::cmp::Reverse<usize>, Option<&str>)> = Vec::new();
    for Wrap { start, end, filter } in wraps {
        marks.push((start, std::cmp::Reverse(usize::MAX), None));
        marks.push((end, std::cmp::Reverse(start), Some(filter)));
    }
    marks.sort_by_key(|(place, begins, _)| (*place, *begins));
    let (mut text, mut done) = (String::with_capacity(template.len()), 0);
    for (place, _, filter) in marks {
        // Offsets of the parser's own tokens.
        text.push_str(template.get(done..place).unwrap_or_default());
        done = place;
        match filter {
            None => text.push('('),
            Some(filter) => {
                text.push_str(")|");
                text.push_str(filter);
            }
        }
    }
    text.push_str(template.get(done..).unwrap_or_default());
    text
}

/// Where an expression begins. The parser's own spans of a filter and a test begin at its name, those
/// of a comparison and a condition at the token before, those of an attribute and a call perhaps
/// at the attribute before. A parenthesis around the
/// beginning does not count: it makes no difference on which side of it another one stands.
fn start(expr: &Expr<'_>) -> usize {
    let mut expr = expr;
    let mut least = usize::MAX;
    loop {
        let own = |span: Span| span.start_offset as usize;
        match expr {
            Expr::Filter(filter) => match &filter.expr {
                Some(inner) => expr = inner,
                None => return least.min(own(filter.span())),
            },
            Expr::Test(test) => expr = &test.expr,
            Expr::GetAttr(attribute) => expr = &attribute.expr,
            Expr::GetItem(item) => expr = &item.expr,
            Expr::Slice(slice) => expr = &slice.expr,
            Expr::Call(call) => expr = &call.expr,
            Expr::UnaryOp(unary) if matches!(unary.op, UnaryOpKind::Not) => {
                least = least.min(own(unary.span()));
                expr = &unary.expr;
            }
            Expr::BinOp(op) if is_comparison(op.op) => expr = &op.left,
            Expr::Compare(compare) => expr = &compare.expr,
            Expr::IfExpr(condition) => expr = &condition.true_expr,
            other => return least.min(own(other.span())),
        }
    }
}

fn is_comparison(op: BinOpKind) -> bool {
    matches!(
        op,
        BinOpKind::Eq
            | BinOpKind::Ne
            | BinOpKind::Lt
            | BinOpKind::Lte
            | BinOpKind::Gt
            | BinOpKind::Gte
            | BinOpKind::In
    )
}

fn visit_stmt<'t, 's>(
    stmt: &'t Stmt<'s>,
    open: &mut Vec<Node<'t, 's>>,
    wraps: &mut Vec<Wrap>,
) -> Result<(), Unlike> {
    let mut all = |list: &'t [Stmt<'s>]| open.extend(list.iter().map(Node::Stmt));
    match stmt {
        Stmt::Template(template) => all(&template.children),
        Stmt::ForLoop(each) => {
            all(&each.body);
            all(&each.else_body);
            wraps.push(Wrap::of(&each.iter, ITEMS));
            open.push(Node::Expr(&each.iter));
            open.extend(each.filter_expr.iter().map(Node::Expr));
        }
        Stmt::IfCond(condition) => {
            all(&condition.true_body);
            all(&condition.false_body);
            open.push(Node::Expr(&condition.expr));
        }
        Stmt::WithBlock(with) => {
            all(&with.body);
            open.extend(with.assignments.iter().map(|(_, value)| Node::Expr(value)));
        }
        Stmt::Set(set) => open.push(Node::Expr(&set.expr)),
        Stmt::SetBlock(set) => {
            all(&set.body);
            open.extend(set.filter.iter().map(Node::Expr));
        }
        Stmt::AutoEscape(escape) => all(&escape.body),
        Stmt::FilterBlock(block) => {
            all(&block.body);
            open.push(Node::Expr(&block.filter));
        }
        Stmt::EmitExpr(emit) => open.push(Node::Expr(&emit.expr)),
        Stmt::Macro(own) => visit_macro(own, own.span(), open)?,
        Stmt::CallBlock(block) => {
            visit_macro(&block.macro_decl, block.macro_decl.span(), open)?;
            open.push(Node::Expr(&block.call.expr));
            open.extend(block.call.args.iter().map(of_argument));
        }
        Stmt::Do(call) => {
            open.push(Node::Expr(&call.call.expr));
            open.extend(call.call.args.iter().map(of_argument));
        }
        // What writes no value.
        _ => {}
    }
    Ok(())
}

/// In Python a default may name an argument before it, here it would be another variable or none.
fn visit_macro<'t, 's>(
    own: &'t Macro<'s>,
    span: Span,
    open: &mut Vec<Node<'t, 's>>,
) -> Result<(), Unlike> {
    open.extend(own.body.iter().map(Node::Stmt));
    open.extend(own.defaults.iter().map(Node::Expr));
    let names: Vec<&str> = own.args.iter().filter_map(name_of).collect();
    let mut inside: Vec<Node<'t, 's>> = own.defaults.iter().map(Node::Expr).collect();
    while let Some(node) = inside.pop() {
        let Node::Expr(expr) = node else { continue };
        if let Some(name) = name_of(expr).filter(|name| names.contains(name)) {
            return Err(Unlike::Otherwise(
                span.start_line.into(),
                format!(
                    "a default of the macro `{}` is made of its argument `{name}`, which Python's \
                     Jinja does and this engine of templates does not",
                    own.name
                ),
            ));
        }
        visit_expr(expr, &mut inside, &mut Vec::new());
    }
    Ok(())
}

fn name_of<'s>(expr: &Expr<'s>) -> Option<&'s str> {
    match expr {
        Expr::Var(variable) => Some(variable.id),
        _ => None,
    }
}

fn of_argument<'t, 's>(argument: &'t CallArg<'s>) -> Node<'t, 's> {
    let (CallArg::Pos(expr)
    | CallArg::Kwarg(_, expr)
    | CallArg::PosSplat(expr)
    | CallArg::KwargSplat(expr)) = argument;
    Node::Expr(expr)
}

fn visit_expr<'t, 's>(expr: &'t Expr<'s>, open: &mut Vec<Node<'t, 's>>, wraps: &mut Vec<Wrap>) {
    match expr {
        Expr::Var(_) | Expr::Const(_) => {}
        Expr::Slice(slice) => {
            open.push(Node::Expr(&slice.expr));
            let bounds = [&slice.start, &slice.stop, &slice.step];
            open.extend(bounds.into_iter().flatten().map(Node::Expr));
        }
        Expr::UnaryOp(unary) => open.push(Node::Expr(&unary.expr)),
        Expr::BinOp(op) => {
            let sides = [&op.left, &op.right];
            if matches!(op.op, BinOpKind::Concat) {
                let is_concat = |side: &Expr<'_>| matches!(side, Expr::BinOp(inner) if matches!(inner.op, BinOpKind::Concat));
                // Of a chain each link once.
                let links = sides.into_iter().filter(|side| !is_concat(side));
                wraps.extend(links.map(|side| Wrap::of(side, TEXT)));
            }
            open.extend(sides.map(Node::Expr));
        }
        Expr::Compare(compare) => {
            open.push(Node::Expr(&compare.expr));
            open.extend(compare.ops.iter().map(|op| Node::Expr(&op.expr)));
        }
        Expr::IfExpr(condition) => {
            open.extend([&condition.test_expr, &condition.true_expr].map(Node::Expr));
            open.extend(condition.false_expr.iter().map(Node::Expr));
        }
        Expr::Filter(filter) => {
            // What is joined by an attribute are texts of messages.
            if let (Some(inner), "join", 0 | 1) = (&filter.expr, filter.name, filter.args.len()) {
                wraps.push(Wrap::of(inner, TEXTS));
            }
            open.extend(filter.expr.iter().map(Node::Expr));
            open.extend(filter.args.iter().map(of_argument));
        }
        Expr::Test(test) => {
            open.push(Node::Expr(&test.expr));
            open.extend(test.args.iter().map(of_argument));
        }
        Expr::GetAttr(attribute) => open.push(Node::Expr(&attribute.expr)),
        Expr::GetItem(item) => {
            open.extend([&item.expr, &item.subscript_expr].map(Node::Expr));
        }
        Expr::Call(call) => {
            open.push(Node::Expr(&call.expr));
            open.extend(call.args.iter().map(of_argument));
        }
        Expr::List(list) => open.extend(list.items.iter().map(Node::Expr)),
        Expr::Tuple(tuple) => open.extend(tuple.items.iter().map(Node::Expr)),
        Expr::Map(map) => {
            open.extend(map.keys.iter().chain(&map.values).map(Node::Expr));
        }
    }
}
