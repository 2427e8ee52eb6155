import java.util.ArrayList;
import java.util.List;

/** Ends with the runtime's own "out of memory", before the sandbox has to. */
public class Heap {
    public static void main(String[] args) {
        List<long[]> kept = new ArrayList<>();
        while (true) {
            kept.add(new long[1 << 17]);
        }
    }
}
