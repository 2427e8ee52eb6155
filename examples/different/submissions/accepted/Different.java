import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintWriter;
import java.util.StringTokenizer;

public class Different {
    /** Proof that classes beside the main one arrive, too. */
    static final class Pair {
        final long a, b;

        Pair(StringTokenizer words) {
            a = Long.parseLong(words.nextToken());
            b = Long.parseLong(words.nextToken());
        }

        String distance() {
            return Long.toUnsignedString(Math.max(a, b) - Math.min(a, b));
        }
    }

    public static void main(String[] args) throws IOException {
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        PrintWriter out = new PrintWriter(System.out);
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            out.println(new Pair(new StringTokenizer(line)).distance());
        }
        out.flush();
    }
}
