use std::io::{self, BufRead, BufWriter, Write};

fn main() -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout());
    for line in io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let mut next = || words.next().unwrap().parse::<i64>().unwrap();
        let (a, b) = (next(), next());
        writeln!(out, "{}", a.abs_diff(b))?;
    }
    out.flush()
}
