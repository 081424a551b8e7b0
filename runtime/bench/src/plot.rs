//! The boots as a drawing: above, when what happens in the median boot; below, how far single boots are apart. Written
//! by hand: rectangles, lines and text are all it takes.

use std::fmt::Write as _;

use crate::{
    phases::{Figure, Phase},
    report::{Measured, Report, Scale, Series},
};

const WIDTH: f64 = 960.0;
/// What is left on both sides.
const MARGIN: f64 = 40.0;
const BAR: f64 = 34.0;
/// Of one subject: title, bar, and room below.
const ROW: f64 = 74.0;
const LEGEND_ROW: f64 = 24.0;
const STRIP: f64 = 84.0;
/// Room for the longest number behind a bar.
const BEHIND: f64 = 90.0;
/// A label inside of a bar must have this much room.
const LABEL: f64 = 46.0;
/// Where the columns of the legend end.
const COLUMNS: [f64; 2] = [470.0, 600.0];
const INK: &str = "#1f2933";
const DIM: &str = "#616e7c";
const GRID: &str = "#dfe4ea";

/// The figure whose distribution is drawn: the most complete one that there is.
const DISTRIBUTED: [Figure; 3] = [Figure::Wall, Figure::Hello, Figure::Chroot];

/// Colours that can be told apart, after Okabe and Ito, with black or white to write on them.
fn colour(phase: Phase) -> (&'static str, &'static str) {
    match phase {
        Phase::Host => ("#b8c0c8", INK),
        Phase::Early => ("#e69f00", INK),
        Phase::Core => ("#56b4e9", INK),
        Phase::Initcalls | Phase::Kernel => ("#0072b2", "white"),
        Phase::Memory => ("#009e73", "white"),
        Phase::Exec => ("#f0e442", INK),
        Phase::Agent => ("#d55e00", "white"),
        Phase::Mount => ("#cc79a7", INK),
        Phase::Chroot => ("#882255", "white"),
    }
}

/// A range of numbers along the drawing.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Axis {
    low: f64,
    high: f64,
    left: f64,
    right: f64,
}

impl Axis {
    /// Where a number is.
    fn at(&self, value: f64) -> f64 {
        self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)
    }

    /// Round numbers in the range, some six of them.
    fn ticks(&self) -> Vec<f64> {
        let step = step((self.high - self.low) / 6.0);
        let first = (self.low / step).ceil();
        (0..=12).map(|n| (first + f64::from(n)) * step).take_while(|tick| *tick <= self.high + step * 1e-9).collect()
    }
}

/// The least of 1, 2, 5, 10, ... that is no less.
fn step(least: f64) -> f64 {
    if !(least.is_finite() && least > 0.0) {
        return 1.0;
    }
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= least).unwrap_or(10.0 * power)
}

/// With as many digits as say something.
fn number(value: f64) -> String {
    match value.abs() {
        small if small < 9.995 => format!("{value:.2}"),
        medium if medium < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// A number on an axis, as short as it can be told from its neighbours.
fn tick_label(value: f64, step: f64) -> String {
    let digits = (0..6).find(|digits| {
        let scaled = step * 10f64.powi(*digits);
        (scaled - scaled.round()).abs() < 1e-6 * scaled.max(1.0)
    });
    format!("{value:.*}", usize::try_from(digits.unwrap_or(6)).unwrap_or(6))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// SVG in the making. Writing to a string cannot fail.
struct Drawing {
    body: String,
}

impl Drawing {
    fn rectangle(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str, what: &str) {
        let _ = writeln!(
            self.body,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.2}" height="{height:.1}" fill="{fill}"><title>{}</title></rect>"#,
            escape(what)
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), stroke: &str, width: f64) {
        let _ = writeln!(
            self.body,
            r#"<line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="{stroke}" stroke-width="{width}"/>"#,
            from.0, from.1, to.0, to.1
        );
    }

    fn circle(&mut self, x: f64, y: f64, fill: &str) {
        let _ = writeln!(
            self.body,
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="4.5" fill="{fill}" fill-opacity="0.55" stroke="{fill}"/>"#
        );
    }

    /// `anchor`: start, middle or end.
    fn text(&mut self, x: f64, y: f64, size: u32, fill: &str, anchor: &str, text: &str) {
        let weight = if size > 13 { r#" font-weight="600""# } else { "" };
        // Grid lines keep away from it, except where it is written on a bar.
        let halo = if anchor == "middle" { "" } else { r#" stroke="white" stroke-width="5" paint-order="stroke""# };
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.1}" y="{y:.1}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}{halo}>{}</text>"#,
            escape(text)
        );
    }

    fn axis(&mut self, axis: Axis, top: f64, bottom: f64, unit: &str) {
        let ticks = axis.ticks();
        let step = step((axis.high - axis.low) / 6.0);
        for tick in ticks {
            let x = axis.at(tick);
            self.line((x, top), (x, bottom), GRID, 1.0);
            self.text(x, bottom + 16.0, 12, DIM, "middle", &tick_label(tick, step));
        }
        self.text(WIDTH - MARGIN, bottom + 16.0, 12, DIM, "end", unit);
    }
}

fn total(subject: &Measured) -> f64 {
    subject.phases.iter().map(|series| series.summary.median).sum()
}

/// At most so many characters, the end of them kept: of a path it says more than the beginning.
fn shorten(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    format!("…{}", text.chars().skip(count - most + 1).collect::<String>())
}

/// Draws it.
pub fn svg(report: &Report) -> String {
    let mut drawing = Drawing { body: String::new() };
    let scale = report.scale();
    let boots = report.subjects.iter().flat_map(|subject| &subject.phases).map(|series| series.values.len()).max();
    let boots = boots.unwrap_or_default();
    let mut y = 46.0;
    drawing.text(MARGIN, y, 20, INK, "start", "Where a boot's time goes");
    y += 22.0;
    let medians = if boots == 1 { "one boot".into() } else { format!("each phase's median of {boots} boots") };
    let what = format!("{}; {medians}, in {}", report.setting(), scale.unit);
    drawing.text(MARGIN, y, 13, DIM, "start", &what);
    y = timeline(&mut drawing, report, &scale, y + 18.0);
    y = legend(&mut drawing, report, &scale, y + 62.0);
    y = distribution(&mut drawing, report, &scale, y + 42.0);
    let height = y + 20.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         font-family=\"system-ui, 'DejaVu Sans', Arial, sans-serif\">\n\
         <rect width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"white\"/>\n{}</svg>\n",
        drawing.body
    )
}

/// A bar for each subject, its parts one after the other.
fn timeline(drawing: &mut Drawing, report: &Report, scale: &Scale, top: f64) -> f64 {
    let longest = report.subjects.iter().map(total).fold(0.0, f64::max);
    // Of nothing there is nothing to see, but a drawing.
    let high = scale.of(longest).max(f64::MIN_POSITIVE);
    let axis = Axis { low: 0.0, high, left: MARGIN, right: WIDTH - MARGIN - BEHIND };
    let bottom = top + ROW * report.subjects.len() as f64;
    drawing.axis(axis, top + 10.0, bottom, scale.unit);
    for (index, subject) in report.subjects.iter().enumerate() {
        let y = top + ROW * index as f64 + 30.0;
        drawing.text(MARGIN, y - 8.0, 13, INK, "start", &shorten(&subject.title(), 110));
        let mut begun = 0.0;
        for series in &subject.phases {
            let value = scale.of(series.summary.median);
            let (from, to) = (axis.at(begun), axis.at(begun + value));
            let (fill, ink) = colour(series.name);
            drawing.rectangle(from, y, to - from, BAR, fill, &format!("{}: {}", series.title, number(value)));
            if to - from >= LABEL {
                drawing.text(from.midpoint(to), y + BAR / 2.0 + 4.5, 12, ink, "middle", &number(value));
            }
            begun += value;
        }
        drawing.text(axis.at(begun) + 8.0, y + BAR / 2.0 + 5.0, 14, INK, "start", &number(begun));
    }
    bottom
}

/// What the colours mean, with the numbers.
fn legend(drawing: &mut Drawing, report: &Report, scale: &Scale, top: f64) -> f64 {
    let mut phases: Vec<&Series<Phase>> = Vec::new();
    for series in report.subjects.iter().flat_map(|subject| &subject.phases) {
        if phases.iter().all(|known| known.name != series.name) {
            phases.push(series);
        }
    }
    phases.sort_by_key(|series| series.name);
    let mut y = top;
    if report.subjects.len() > 1 {
        for (x, name) in COLUMNS.into_iter().zip(["first", "second"]) {
            drawing.text(x, y - LEGEND_ROW + 2.0, 12, DIM, "end", name);
        }
    }
    for series in phases {
        drawing.rectangle(MARGIN, y - 11.0, 14.0, 14.0, colour(series.name).0, series.title);
        drawing.text(MARGIN + 24.0, y, 13, INK, "start", series.title);
        for (x, subject) in COLUMNS.into_iter().zip(&report.subjects) {
            let found = subject.phases.iter().find(|other| other.name == series.name);
            let value = found.map_or_else(|| "–".into(), |series| number(scale.of(series.summary.median)));
            drawing.text(x, y, 13, INK, "end", &value);
        }
        y += LEGEND_ROW;
    }
    y - LEGEND_ROW
}

/// A strip for each subject, with a dot for each boot.
fn distribution(drawing: &mut Drawing, report: &Report, scale: &Scale, top: f64) -> f64 {
    let has = |figure: &Figure| report.subjects.iter().all(|s| s.figures.iter().any(|series| series.name == *figure));
    let Some(figure) = DISTRIBUTED.into_iter().find(has) else { return top };
    let strips: Vec<(&Measured, &Series<Figure>)> = report
        .subjects
        .iter()
        .filter_map(|subject| Some((subject, subject.figures.iter().find(|series| series.name == figure)?)))
        .collect();
    drawing.text(MARGIN, top, 16, INK, "start", &format!("Boot by boot: {}", figure.title()));
    drawing.text(MARGIN, top + 20.0, 12, DIM, "start", "a dot for each boot; long line: median, short line: p90");
    let low = strips.iter().map(|(_, series)| scale.of(series.summary.min)).fold(f64::INFINITY, f64::min);
    let high = strips.iter().map(|(_, series)| scale.of(series.summary.max)).fold(0.0, f64::max);
    // Room at both ends, also where all are the same.
    let room = ((high - low) * 0.06).max(high * 0.005).max(f64::MIN_POSITIVE);
    let axis = Axis { low: (low - room).max(0.0), high: high + room, left: MARGIN, right: WIDTH - MARGIN };
    let begin = top + 32.0;
    let bottom = begin + STRIP * strips.len() as f64;
    drawing.axis(axis, begin, bottom, "");
    for (index, (subject, series)) in strips.iter().enumerate() {
        let y = begin + STRIP * index as f64;
        let (middle, spread) = (y + 50.0, 14.0);
        drawing.text(MARGIN, y + 18.0, 13, INK, "start", &shorten(&subject.title(), 60));
        let summary = &series.summary;
        let said = format!(
            "median {}, p90 {}, {} to {} {}",
            scale.show(summary.median),
            scale.show(summary.p90),
            scale.show(summary.min),
            scale.show(summary.max),
            scale.unit
        );
        drawing.text(WIDTH - MARGIN, y + 18.0, 12, DIM, "end", &said);
        let fill = if index == 0 { "#0072b2" } else { "#d55e00" };
        for (number, value) in series.values.iter().enumerate() {
            // Beside each other rather than on top of each other: five lanes, in turn.
            let lane = f64::from(u8::try_from(number % 5).unwrap_or(0)) - 2.0;
            drawing.circle(axis.at(scale.of(*value as f64)), middle + lane * spread / 2.0, fill);
        }
        for (value, reach, width) in [(summary.median, 24.0, 2.0), (summary.p90, 12.0, 2.0)] {
            let x = axis.at(scale.of(value));
            drawing.line((x, middle - reach), (x, middle + reach), INK, width);
        }
    }
    bottom + 20.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        phases::Unit,
        report::tests::{boot, report, setting, subject},
    };

    /// Widths of the bars of this colour, in order.
    fn widths(svg: &str, fill: &str) -> Vec<f64> {
        let bar = |line: &&str| {
            line.starts_with("<rect") && line.contains(&format!("fill=\"{fill}\"")) && line.contains("height=\"34.0\"")
        };
        let width = |line: &str| line.split_once("width=\"")?.1.split_once('"')?.0.parse().ok();
        svg.lines().filter(bar).filter_map(width).collect()
    }

    #[test]
    fn bars_are_as_long_as_their_numbers() {
        let svg = svg(&report());
        let all = WIDTH - 2.0 * MARGIN - BEHIND;
        // Medians: 25 and 5 ms, and 75 and 5 ms, which is the longest.
        let expected = [25.0, 75.0].map(|value| value / 80.0 * all);
        for (found, wanted) in widths(&svg, "#0072b2").iter().zip(expected) {
            assert!((found - wanted).abs() < 0.01, "{found} {wanted}");
        }
        assert_eq!(widths(&svg, "#d55e00").len(), 2);
        assert_eq!(svg.matches("<circle").count(), 8);
        assert!(svg.contains(">80.0</text>") && svg.contains("median of 4 boots"), "{svg}");
    }

    #[test]
    fn names_cannot_become_elements() {
        let svg = svg(&report());
        assert!(svg.contains("out/&lt;other&gt;") && !svg.contains("<other>"));
        let opened = svg.matches("<text").count();
        assert_eq!(opened, svg.matches("</text>").count());
        assert!(
            svg.starts_with("<svg ")
                && svg.trim_end().ends_with("</svg>")
                && !svg.contains("NaN")
                && !svg.contains("inf")
        );
    }

    #[test]
    fn boots_that_are_all_the_same_are_drawn() {
        let one = subject("x");
        let same = || boot(&[(Phase::Kernel, 28_333_417), (Phase::Agent, 0)]);
        let report = Report::new(setting(Unit::Instructions), vec![(&one, vec![same(), same()])]);
        let svg = svg(&report);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(svg.contains("million instructions"));
        let nothing = Report::new(setting(Unit::Time), vec![(&one, vec![boot(&[(Phase::Kernel, 0)])])]);
        assert!(!super::svg(&nothing).contains("NaN"));
    }

    #[test]
    fn ticks_are_round_and_in_the_range() {
        let axis = Axis { low: 3.0, high: 1234.0, left: 0.0, right: 100.0 };
        assert_eq!(axis.ticks(), [500.0, 1000.0]);
        let axis = Axis { low: 0.0, high: 0.55, left: 0.0, right: 100.0 };
        assert_eq!(
            axis.ticks().iter().map(|tick| tick_label(*tick, 0.1)).collect::<Vec<_>>(),
            ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]
        );
        assert_eq!((step(0.0), step(1.0), step(1.1), step(4.0), step(70.0)), (1.0, 1.0, 2.0, 5.0, 100.0));
        assert_eq!(tick_label(1000.0, 500.0), "1000");
    }

    #[test]
    fn numbers_have_the_digits_that_count() {
        assert_eq!(
            ["0.00", "9.99", "10.0", "99.9", "100"],
            [0.0, 9.99, 9.999, 99.9, 99.96].map(number).each_ref().map(String::as_str)
        );
        assert_eq!(shorten("abc", 3), "abc");
        assert_eq!(shorten("/long/path", 5), "…path");
    }
}
