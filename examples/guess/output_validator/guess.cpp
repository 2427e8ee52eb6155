// The warden: guess input answer feedback/ < what the submission prints > what it reads
// Exits with 42 if the number was found, with 43 if not; any other end is the warden's own failure.
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

static std::string feedback;

[[noreturn]] static void wrong(const std::string &why) {
    std::ofstream(feedback + "judgemessage.txt") << why << '\n';
    std::exit(43);
}

int main(int count, char **words) {
    if (count < 4) return 1;
    feedback = words[3];
    std::ifstream input(words[1]);
    long most, secret;
    int tries;
    if (!(input >> most >> secret >> tries)) return 1;
    std::cout << most << ' ' << tries << std::endl;
    for (int guesses = 1; guesses <= tries; guesses++) {
        std::string word;
        if (!(std::cin >> word)) wrong("no guess " + std::to_string(guesses) + ": the output ends");
        std::string shown = word.substr(0, 40);
        if (word.empty() || word.size() > 10 || word.find_first_not_of("0123456789") != word.npos)
            wrong("guess " + std::to_string(guesses) + " is no number: " + shown);
        long guess = std::stol(word);
        if (guess < 1 || guess > most)
            wrong("guess " + std::to_string(guesses) + " is out of range: " + shown);
        if (guess == secret) {
            std::cout << "correct" << std::endl;
            if (std::cin >> word) wrong("it goes on after the number was found");
            std::ofstream(feedback + "judgemessage.txt") << guesses << " guesses\n";
            return 42;
        }
        std::cout << (guess < secret ? "higher" : "lower") << std::endl;
    }
    std::ofstream(feedback + "teammessage.txt") << "You have no guess left.\n";
    wrong("not found in " + std::to_string(tries) + " guesses");
}
