//! Text in columns, coloured on a terminal.

use std::{
    env,
    io::{self, IsTerminal},
};

/// Colours, as far as this terminal has them.
#[derive(Debug, Clone, Copy)]
pub enum Style {
    /// As it is.
    Plain,
    /// All is well.
    Good,
    /// Worth a look.
    Notable,
    /// Not well.
    Bad,
    /// Less important.
    Dim,
}

/// Whether standard output shows colours: on a terminal that is not dumb, unless NO_COLOR says otherwise.
pub fn colours() -> bool {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    io::stdout().is_terminal() && set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb")
}

/// `text` in a style.
pub fn paint(text: &str, style: Style, colours: bool) -> String {
    let code = match style {
        Style::Plain => return text.to_owned(),
        Style::Good => "32",
        Style::Notable => "33",
        Style::Bad => "1;31",
        Style::Dim => "2",
    };
    if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Rows in columns that are as wide as they must be; the last one is left as it is.
pub fn columns(rows: &[Vec<(String, Style)>], colours: bool) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count)
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(|(text, _)| text.chars().count()).max())
        .map(Option::unwrap_or_default)
        .collect();
    let mut all = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (text, style)) in row.iter().enumerate() {
            line.push_str(&paint(text, *style, colours));
            if column + 1 < row.len() {
                line.push_str(&" ".repeat(widths[column] - text.chars().count() + 2));
            }
        }
        all.push_str(line.trim_end());
        all.push('\n');
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_whatever_their_colour() {
        let row = |a: &str, b: &str| vec![(a.to_owned(), Style::Good), (b.to_owned(), Style::Plain)];
        let rows = [row("a", "x"), row("long", "y"), row("ü", "")];
        assert_eq!(columns(&rows, false), "a     x\nlong  y\nü\n");
        assert_eq!(columns(&rows[..1], true), "\x1b[32ma\x1b[0m  x\n");
    }
}
